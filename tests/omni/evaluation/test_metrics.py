"""The metrics equal the reference's, and score known mistakes as computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from omni.errors import OmniError
from omni.evaluation import metrics
from omni.evaluation.metrics import evaluate, queries, scored_frames, tap_vid
from omni.evaluation.truth import Truth
from omni.tracking.tracks import Tracks

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
NAMES = {
    "AJ": "average_jaccard",
    "delta_avg": "average_pts_within_thresh",
    "OA": "occlusion_accuracy",
    **{f"delta_{d}": f"pts_within_{d}" for d in metrics.DISTANCES},
    **{f"jaccard_{d}": f"jaccard_{d}" for d in metrics.DISTANCES},
}


def make_truth(points=9, frames=13, size=(256, 256), seed=0, **changes):
    """Smooth tracks; every track is visible at frame 0, hidden at about a quarter of the rest."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0.2, 0.8, (points, 1, 2)) * [size[1], size[0]]
    steps = rng.normal(0, 1, (points, 1, 2)) * np.arange(frames)[:, None]
    tracks = (start + steps).astype(np.float32)
    visible = rng.random((points, frames)) > 0.25
    visible[:, 0] = True
    fields = {
        "tracks": tracks,
        "visible": visible,
        "annotated": np.ones((points, frames), bool),
        "query_points": np.column_stack([np.zeros(points), tracks[:, 0, ::-1]]).astype(np.float32),
        "size": size,
    }
    return Truth(**fields | changes)


def perfect(truth, **changes):
    """The prediction that equals the truth, with `changes` on top."""
    fields = {
        "tracks": np.nan_to_num(truth.tracks),
        "visible": truth.visible,
        "visibility": truth.visible.astype(np.float32),
        "sigma": np.ones(truth.visible.shape, np.float32),
        "query_points": truth.query_points,
        "size": truth.size,
        "fps": 24.0,
    }
    return Tracks(**fields | changes)


def slow_scores(prediction, truth, mode):
    """AJ, delta_avg and OA entry by entry, as their definition reads. 256 x 256 pixels only."""
    agree = total = visible = 0
    hit = dict.fromkeys(metrics.DISTANCES, 0)
    true_positive, false_positive = dict(hit), dict(hit)
    for n in range(len(truth.tracks)):
        query = int(np.rint(truth.query_points[n, 0]))
        for t in range(truth.tracks.shape[1]):
            if t == query or (mode == "first" and t < query) or not truth.annotated[n, t]:
                continue
            seen, claimed = bool(truth.visible[n, t]), bool(prediction.visible[n, t])
            total, agree, visible = total + 1, agree + (seen == claimed), visible + seen
            x, y = prediction.tracks[n, t] - truth.tracks[n, t]
            for d in metrics.DISTANCES:
                near = float(x) ** 2 + float(y) ** 2 < d * d
                hit[d] += seen and near
                true_positive[d] += seen and near and claimed
                false_positive[d] += claimed and not (seen and near)
    return {
        "OA": agree / total,
        "delta_avg": np.mean([hit[d] / visible for d in hit]),
        "AJ": np.mean([true_positive[d] / (visible + false_positive[d]) for d in hit]),
    }


@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("case", range(8))
def test_tap_vid_equals_the_reference_implementation(case, mode):
    path = DATA / "metrics_golden.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    expected = json.loads(path.with_suffix(".json").read_text())[f"{case}_{mode}"]
    with np.load(path) as data:
        names = ("query_points", "tracks", "visible", "pred_tracks", "pred_visible")
        points, true, visible, predicted, claimed = (data[f"{case}_{name}"] for name in names)
    scored = scored_frames(points, true.shape[1], mode)
    scores = tap_vid(predicted, claimed, true, visible, scored)
    assert {NAMES[name] for name in scores} == set(expected)
    for name, value in scores.items():
        if expected[NAMES[name]] is None:
            assert value is None
        else:
            assert value == pytest.approx(expected[NAMES[name]], abs=1e-6)


@pytest.mark.parametrize("mode", ["first", "strided", "given"])
def test_scores_equal_a_transparent_loop(mode):
    rng = np.random.default_rng(1)
    source = make_truth(seed=2, annotated=rng.random((9, 13)) > 0.1)
    truth = queries(source, mode)
    prediction = perfect(
        truth,
        tracks=truth.tracks + rng.normal(0, 4, truth.tracks.shape).astype(np.float32),
        visible=rng.random(truth.visible.shape) > 0.3,
    )
    scores = evaluate(prediction, source, mode)
    expected = slow_scores(prediction, truth, mode)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_perfect_tracks_score_one_in_every_mode():
    truth = make_truth()
    for mode in ("first", "strided", "given"):
        scores = evaluate(perfect(queries(truth, mode)), truth, mode)
        assert [scores[name] for name in ("AJ", "delta_avg", "OA")] == [1, 1, 1]
        assert scores["TC"] == 0


def test_a_half_pixel_shift_of_both_axes_costs_nothing_but_one_pixel_costs_the_first_threshold():
    truth = make_truth()
    half = evaluate(perfect(truth, tracks=truth.tracks + np.float32(0.5)), truth, "given")
    assert half["delta_1"] == 1  # 0.71 px
    one = evaluate(perfect(truth, tracks=truth.tracks + np.float32(0.75)), truth, "given")
    assert one["delta_1"] == 0 and one["delta_2"] == 1  # 1.06 px
    assert one["delta_avg"] == pytest.approx(0.8) and one["AJ"] == pytest.approx(0.8)
    assert one["TC"] == pytest.approx(0, abs=1e-4)


def test_swapped_axes_are_wrong_by_the_distance_to_the_diagonal():
    truth = make_truth(points=2, frames=3)
    truth.tracks[0], truth.tracks[1] = [100, 102], [10, 200]  # mirrored: 2.8 px and 269 px off
    truth.visible[:] = True
    points = np.array([[0, 102, 100], [0, 200, 10]], np.float32)
    truth = Truth(truth.tracks, truth.visible, truth.annotated, points, truth.size)
    scores = evaluate(perfect(truth, tracks=truth.tracks[..., ::-1]), truth, "given")
    assert [scores[f"delta_{d}"] for d in metrics.DISTANCES] == [0, 0, 0.5, 0.5, 0.5]
    # Half of the claims are right: 2 of 4 visible entries, plus 2 false positives.
    assert scores["jaccard_4"] == pytest.approx(2 / (4 + 2))


def test_tracks_one_frame_late_are_off_by_one_step_of_motion():
    truth = make_truth(points=1, frames=6)
    truth.tracks[0] = np.array([50, 50]) + np.arange(6)[:, None] * [3, 0]
    truth.visible[:] = True
    truth.query_points[0] = [0, 50, 50]
    late = np.concatenate([truth.tracks[:, :1], truth.tracks[:, :-1]], axis=1)
    scores = evaluate(perfect(truth, tracks=late), truth, "given")
    assert [scores[f"delta_{d}"] for d in metrics.DISTANCES] == [0, 0, 1, 1, 1]
    assert scores["TC"] == pytest.approx(3 / 4)  # one kink of 3 px in four triples


def test_temporal_coherence_needs_three_visible_frames_in_a_row():
    truth = make_truth(points=1, frames=5)
    truth.visible[0] = [True, True, True, False, True]
    jumping = truth.tracks.copy()
    jumping[0, 1] += [3, 4]  # 5 px off in the middle: acceleration off by 10 px
    jumping[0, 3] += 100
    assert evaluate(perfect(truth, tracks=jumping), truth, "given")["TC"] == pytest.approx(10)
    truth.visible[0, 1] = False
    assert evaluate(perfect(truth, tracks=jumping), truth, "given")["TC"] is None


def test_first_and_strided_queries_are_those_of_tap_vid():
    truth = make_truth(points=3, frames=12)
    truth.visible[:] = False
    truth.visible[0, 3:] = True
    truth.visible[2, [0, 5, 11]] = True
    first, strided = queries(truth, "first"), queries(truth, "strided")
    assert first.query_points[:, 0].tolist() == [3, 0]  # the second is never visible
    np.testing.assert_array_equal(first.query_points[:, :0:-1], truth.tracks[[0, 2], [3, 0]])
    assert strided.query_points[:, 0].tolist() == [0, 5, 5, 10]
    np.testing.assert_array_equal(strided.tracks, truth.tracks[[2, 0, 2, 0]])
    scored = scored_frames(first.query_points, 12, "first")
    assert scored[0].tolist() == [False] * 4 + [True] * 8
    assert scored_frames(strided.query_points, 12, "strided").sum(axis=1).tolist() == [11] * 4


def test_entries_that_are_not_annotated_change_nothing():
    truth = make_truth()
    truth.annotated[:, 4:7] = False
    truth.tracks[:, 4:7] = np.nan
    good = perfect(truth)
    bad = perfect(truth, visible=truth.visible.copy())
    bad.tracks[:, 4:7] += 500
    bad.visible[:, 4:7] ^= True
    assert evaluate(bad, truth, "given") == evaluate(good, truth, "given")


def test_resolution_of_either_side_does_not_change_the_score():
    truth, rng = make_truth(), np.random.default_rng(3)
    noisy = truth.tracks + rng.normal(0, 3, truth.tracks.shape).astype(np.float32)
    expected = evaluate(perfect(truth, tracks=noisy), truth, "given")
    scale = np.float32([3, 2])
    points = truth.query_points * np.float32([1, 2, 3])
    large = make_truth(size=(512, 768), tracks=truth.tracks * scale, query_points=points)
    on_large = perfect(large, tracks=noisy * scale)
    on_small = perfect(truth, tracks=noisy)
    for prediction in (on_large, on_small):
        scores = evaluate(prediction, large, "given")
        for name in NAMES:
            assert scores[name] == pytest.approx(expected[name], abs=1e-6)


def test_joints_are_scored_in_native_pixels_and_never_on_visibility():
    area = np.full(13, 625.0, np.float32)  # 0.2 * 25 = 5 px
    area[5] = 0  # no mask, no score
    truth = make_truth(size=(480, 854), mask_area=area)
    truth.visible[:] = True
    tracks = truth.tracks.copy()
    tracks[:, :, 0] += 4.9
    tracks[:, 1:4, 0] += 0.2
    tracks[:, 4] = truth.tracks[:, 4] + [0, 2.9]
    scores = evaluate(perfect(truth, tracks=tracks), truth, "given")
    assert scores["delta_seg"] == pytest.approx(8 / 11)
    assert scores["delta_3px"] == pytest.approx(1 / 12)
    assert all(scores[name] is None for name in ("AJ", "OA", "jaccard_4", "visibility"))
    assert evaluate(perfect(make_truth()), make_truth(), "given")["delta_seg"] is None


def test_sigma_is_evaluated_per_axis_in_the_predictions_own_pixels():
    truth = make_truth(points=300, frames=40, size=(100, 100))
    truth.visible[:] = True
    rng = np.random.default_rng(4)
    noisy = truth.tracks + rng.normal(0, 2.5, truth.tracks.shape).astype(np.float32)
    sigma = np.full(truth.visible.shape, 5.0, np.float32)
    doubled = perfect(
        truth,
        tracks=noisy * 2,
        sigma=sigma,
        size=(200, 200),
        query_points=truth.query_points * np.float32([1, 2, 2]),
    )
    scores = evaluate(doubled, truth, "given")["sigma"]
    assert scores["within_1"] == pytest.approx(0.683, abs=0.01)
    assert scores["within_2"] == pytest.approx(0.954, abs=0.01)
    assert scores["mean_standardised_error"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)
    unknown = perfect(truth, sigma=sigma * np.nan)
    assert set(evaluate(unknown, truth, "given")["sigma"].values()) == {None}


def test_visibility_calibration_of_a_hand_worked_case():
    probability = np.array([[0.9, 0.9, 0.1, 1.0]])
    visible = np.array([[True, False, False, True]])
    scores = metrics.visibility_calibration(probability, visible, np.ones((1, 4), bool))
    assert scores["brier"] == pytest.approx((0.01 + 0.81 + 0.01 + 0) / 4)
    assert [entry["count"] for entry in scores["bins"]] == [1, 3]
    assert scores["bins"][1]["predicted"] == pytest.approx(2.8 / 3)
    assert scores["ece"] == pytest.approx((0.1 + 3 * (2.8 / 3 - 2 / 3)) / 4)


def test_undefined_scores_are_null_in_strict_json():
    truth = make_truth(points=2, frames=1)
    scores = evaluate(perfect(truth), truth, "given")
    text = json.dumps(scores, allow_nan=False)
    assert json.loads(text) == scores
    assert scores["AJ"] is scores["OA"] is scores["TC"] is scores["delta_seg"] is None
    empty = make_truth(points=0)
    json.dumps(evaluate(perfect(empty), empty, "strided"), allow_nan=False)


def test_predictions_of_other_queries_are_refused():
    truth = make_truth()
    moved = truth.query_points + np.float32([0, 0, 0.5])
    later = truth.query_points + np.float32([1, 0, 0])
    for points in (moved, later, truth.query_points[:, [0, 2, 1]]):
        with pytest.raises(OmniError, match="are not the 9 queries of mode 'given'"):
            evaluate(perfect(truth, query_points=points), truth, "given")
    with pytest.raises(OmniError, match="queries of mode 'strided': track those of"):
        evaluate(perfect(truth), truth, "strided")
    with pytest.raises(OmniError, match="12 frames, the truth 13"):
        evaluate(perfect(make_truth(frames=12)), truth, "given")
    with pytest.raises(OmniError, match="unknown: use one of first, strided, given"):
        evaluate(perfect(truth), truth, "last")
    with pytest.raises(OmniError, match="not finite"):
        evaluate(perfect(truth, tracks=truth.tracks * np.nan), truth, "given")


def test_the_table_shows_percentages_and_dashes_for_what_is_undefined():
    truth = make_truth()
    shifted = perfect(truth, tracks=truth.tracks + np.float32(0.75))
    lines = metrics.format_scores(evaluate(shifted, truth, "given")).splitlines()
    assert lines[0] == "mode given: 9 queries, 108 entries"
    assert lines[1].split() == ["AJ", "delta_avg", "OA", "TC", "delta_seg", "delta_3px"]
    assert lines[2].split() == ["80.0", "80.0", "100.0", "0.00", "-", "100.0"]
    assert lines[4].split() == ["delta", "0.0", "100.0", "100.0", "100.0", "100.0"]
    joints = make_truth(mask_area=np.ones(13))
    assert "Brier -" in metrics.format_scores(evaluate(perfect(joints), joints, "given"))
