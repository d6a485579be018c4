"""Exact flows give exact tracks; each method survives what it is meant to survive."""

import numpy as np
import pytest
import torch

from omni.errors import OmniError
from omni.evaluation.baselines import baseline
from omni.maths.coords import pixel_centers, sample_image
from omni.maths.quantisation import encode_flow
from omni.store import Store
from omni.tracking.links import sample_flow

SIZE = (40, 60)
FRAMES = 12
METHODS = ("direct", "chain", "mft")


def log_pairs(frames=FRAMES, cuts=(), gaps=(1, 2, 4, 8)):
    ordered = [(s, s + g) for g in gaps for s in range(frames - g)]
    same_shot = [p for p in ordered if not any(p[0] < cut <= p[1] for cut in cuts)]
    return [pair for s, t in same_shot for pair in ((s, t), (t, s))]


def make_store(folder, flow_of, pairs=None, frames=FRAMES, video_size=SIZE):
    """A store whose flow of a pair is `flow_of(source, target)` at `pixel_centers(SIZE)`."""
    pairs = log_pairs(frames) if pairs is None else pairs
    store = Store(folder)
    with store.stage("frames", "k", {"frames": ((frames, *SIZE, 3), np.uint8)}, 1) as stage:
        stage.meta["cuts"] = []
    with store.stage("flow", "k", {"flow": ((len(pairs), *SIZE, 2), np.int16)}, 1) as stage:
        for k, pair in enumerate(pairs):
            stage.arrays["flow"][k] = encode_flow(np.broadcast_to(flow_of(*pair), (*SIZE, 2)))
        stage.meta.update(pairs=[list(pair) for pair in pairs], provider="none")
    evidence = {"evidence": ((len(pairs), *SIZE), np.uint8)}
    with store.stage("evidence", "k", evidence, 1) as stage:
        gaps = {abs(target - source) for source, target in pairs}
        sigma = {str(gap): [0.25, 0.6] for gap in gaps}
        stage.meta.update(threshold=1.5, sigma=sigma)
    store.note(video={"size": list(video_size), "fps": 10.0, "num_frames": frames})
    return Store.open(folder)


def translation(velocity):
    return lambda source, target: np.float32(velocity) * (target - source)


def rotation(angle):
    """Turn about the frame's centre by `angle` per frame; returns flow_of and the exact map."""

    def move(xy, source, target):
        centre = np.array([SIZE[1] / 2, SIZE[0] / 2])
        a = angle * (target - source)
        turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        return (xy - centre) @ turn.T + centre

    grid = pixel_centers(SIZE).astype(np.float64)
    return (lambda s, t: move(grid, s, t) - grid), move


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_sampled_flow_equals_bilinear_interpolation_also_beyond_the_border(dtype):
    rng = np.random.default_rng(0)
    code = rng.integers(-3000, 3000, (7, 9, 2)).astype(np.int16)
    pixels = code.astype(np.float32) / 32
    xy = rng.uniform(-3, 12, (500, 2)).astype(np.float32)
    expected = sample_image(torch.from_numpy(pixels), torch.from_numpy(xy)).numpy()
    result = sample_flow(code if dtype == np.int16 else pixels, xy)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_a_flow_of_one_row_or_column_can_be_sampled(size):
    flow = np.full((*size, 2), 64, np.int16)
    xy = np.array([[0.2, 0.9], [4, 4]], np.float32)
    np.testing.assert_array_equal(sample_flow(flow, xy), np.full((2, 2), 2.0))


@pytest.mark.parametrize("method", METHODS)
def test_constant_motion_is_followed_forward_and_backward_from_any_frame(tmp_path, method):
    store = make_store(tmp_path, translation([1.5, -0.5]))
    points = np.array([[7, 20.25, 30.75], [0, 30, 10.5], [11, 10, 40], [3.4, 20, 20]], np.float32)
    tracks = baseline(store, points, method)
    elapsed = np.arange(FRAMES) - np.rint(points[:, :1])
    expected = points[:, None, :0:-1] + elapsed[..., None] * [1.5, -0.5]
    np.testing.assert_allclose(tracks.tracks, expected, atol=1e-4)
    assert tracks.visible.all() and tracks.size == SIZE and tracks.fps == 10
    np.testing.assert_array_equal(tracks.query_points, points)


@pytest.mark.parametrize("method", METHODS)
def test_a_rotation_is_followed_within_the_resolution_of_the_stored_flow(tmp_path, method):
    flow_of, move = rotation(0.05)
    store = make_store(tmp_path, flow_of)
    rng = np.random.default_rng(0)
    xy = rng.uniform([22, 12], [38, 28], (20, 2))
    frames = rng.integers(0, FRAMES, 20)
    points = np.column_stack([frames, xy[:, ::-1]]).astype(np.float32)
    tracks = baseline(store, points, method)
    expected = [[move(p, f, t) for t in range(FRAMES)] for p, f in zip(xy, frames, strict=True)]
    # A link is off by at most half a step of 1/32 pixel per axis; chains add up to 11 of them.
    limit = 11 * np.sqrt(2) / 64 if method == "chain" else 4 * np.sqrt(2) / 64
    assert np.linalg.norm(tracks.tracks - expected, axis=-1).max() < limit
    assert tracks.visible.all()


@pytest.mark.parametrize("method", METHODS)
def test_positions_and_sigma_come_in_pixels_of_the_original_video(tmp_path, method):
    same = make_store(tmp_path / "a", translation([1, 0.5]))
    large = make_store(tmp_path / "b", translation([1, 0.5]), video_size=(120, 180))
    points = np.array([[2, 10, 20]], np.float32)
    small_tracks = baseline(same, points, method)
    large_tracks = baseline(large, points * [1, 3, 3], method)
    np.testing.assert_allclose(large_tracks.tracks, 3 * small_tracks.tracks, rtol=1e-5)
    np.testing.assert_allclose(large_tracks.sigma, 3 * small_tracks.sigma, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_point_that_leaves_the_frame_is_hidden_outside(tmp_path, method):
    store = make_store(tmp_path, translation([4, 0]))
    tracks = baseline(store, np.array([[0, 20, 41.5]], np.float32), method)
    assert tracks.visible[0].tolist() == [True] * 5 + [False] * 7  # 57.5 inside, 61.5 outside
    assert np.isfinite(tracks.tracks).all() and np.isfinite(tracks.sigma).all()


def test_mft_jumps_an_occlusion_that_ends_a_chain(tmp_path):
    def occluded_at_five(source, target):
        wrong = 10.0 if target == 5 else (-3.0 if source == 5 else 0.0)
        return np.float32([target - source + wrong, 0])

    store = make_store(tmp_path, occluded_at_five)
    points = np.array([[0, 20, 20]], np.float32)
    chain, mft = (baseline(store, points, method) for method in ("chain", "mft"))
    assert chain.visible[0].tolist() == [True] * 5 + [False] * 7
    assert mft.visible[0].tolist() == [True] * 5 + [False] + [True] * 6
    np.testing.assert_allclose(mft.tracks[0, 6:, 0], 20 + np.arange(6, FRAMES), atol=1e-4)
    assert (np.diff(chain.sigma[0]) > 0).all() and mft.sigma[0, -1] < 1 < chain.sigma[0, -1]


def test_the_threshold_decides_which_link_is_occluded(tmp_path):
    store = make_store(tmp_path, lambda s, t: np.float32([t - s + 0.5, 0]))  # error 1 px
    points = np.array([[0, 20, 20]], np.float32)
    assert baseline(store, points, "chain").visible.all()
    assert baseline(store, points, "chain", threshold=0.9).visible.sum() == 1


def test_direct_uses_the_stored_flow_of_the_pair_and_else_the_fewest(tmp_path):
    # Each link adds 1 px in y, so that y counts the links.
    store = make_store(tmp_path, lambda s, t: np.float32([t - s, 1 if t > s else -1]))
    tracks = baseline(store, np.array([[0, 10, 10]], np.float32), "direct")
    links = tracks.tracks[0, :, 1] - 10
    assert links.tolist() == [0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3]
    exhaustive = [(s, t) for s in range(FRAMES) for t in range(FRAMES) if s != t]
    store = make_store(tmp_path / "all", lambda s, t: np.float32([t - s, t > s]), exhaustive)
    tracks = baseline(store, np.array([[0, 10, 10]], np.float32), "direct")
    assert (tracks.tracks[0, 1:, 1] == 11).all()


def test_missing_direct_flows_are_computed_once_per_pair_and_sweep(tmp_path):
    requested = []

    def direct_flow(source, target):
        requested.append((source, target))
        return np.broadcast_to(np.float32([2 * (target - source), 0]), (*SIZE, 2))

    store = make_store(tmp_path, translation([1, 0]))
    points = np.array([[0, 20, 10], [0, 10, 12]], np.float32)
    tracks = baseline(store, points, "direct", direct_flow)
    moved = tracks.tracks[1, :, 0] - 12
    assert moved.tolist() == [0, 1, 2, 6, 4, 10, 12, 14, 8, 18, 20, 22]
    assert sorted(requested) == sorted(
        pair for t in (3, 5, 6, 7, 9, 10, 11) for pair in ((0, t), (t, 0))
    )


def test_mft_takes_the_direct_flow_where_every_stored_link_is_occluded(tmp_path):
    def blocked(source, target):  # nothing stored passes from before frame 6 to after it
        crosses = min(source, target) < 6 <= max(source, target)
        return np.float32([9 if crosses else target - source, 0])

    store = make_store(tmp_path, blocked)
    points = np.array([[0, 20, 20]], np.float32)
    assert not baseline(store, points, "mft").visible[0, 6:].any()
    direct = baseline(store, points, "mft", lambda s, t: np.full((*SIZE, 2), t - s) * [1, 0])
    assert direct.visible[0, [6, 7, 9, 10, 11]].all()  # 8 can also be linked, from 7
    np.testing.assert_allclose(direct.tracks[0, 6:, 0], 20 + np.arange(6, FRAMES), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_no_track_crosses_a_cut(tmp_path, method):
    store = make_store(tmp_path, translation([1, 0]), log_pairs(cuts=[6]))

    def direct_flow(source, target):
        assert (source < 6) == (target < 6)
        return np.broadcast_to(np.float32([target - source, 0]), (*SIZE, 2))

    points = np.array([[2, 20, 20], [8, 20, 20]], np.float32)
    for given in (None, direct_flow):
        tracks = baseline(store, points, method, given)
        assert tracks.visible[0].tolist() == [True] * 6 + [False] * 6
        assert tracks.visible[1].tolist() == [False] * 6 + [True] * 6
        np.testing.assert_allclose(tracks.tracks[0, 6:, 0], 23)
        assert (tracks.sigma[0, 6:] == max(SIZE)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_track_does_not_depend_on_the_other_queries(tmp_path, method):
    store = make_store(tmp_path, rotation(0.08)[0])
    rng = np.random.default_rng(1)
    points = np.column_stack(
        [rng.integers(0, FRAMES, 30), rng.uniform(0, SIZE[0], 30), rng.uniform(0, SIZE[1], 30)]
    ).astype(np.float32)
    together = baseline(store, points, method)
    for n in (0, 13, 29):
        alone = baseline(store, points[n : n + 1], method)
        for name in ("tracks", "visible", "sigma"):
            np.testing.assert_array_equal(getattr(together, name)[n], getattr(alone, name)[0])


def test_bad_queries_and_methods_are_one_clear_error(tmp_path):
    store = make_store(tmp_path, translation([1, 0]))
    for bad in ([12, 5, 5], [-1, 5, 5], [0, 41, 5], [0, 5, np.nan]):
        with pytest.raises(OmniError, match="query 1 .* outside the video of 12 frames of 60x40"):
            baseline(store, np.array([[0, 1, 1], bad]), "chain")
    with pytest.raises(OmniError, match=r"must be \(N, 3\)"):
        baseline(store, np.zeros((3, 2)), "chain")
    with pytest.raises(OmniError, match="unknown: use one of direct, chain, mft"):
        baseline(store, np.zeros((1, 3)), "raft")
    assert baseline(store, np.zeros((0, 3)), "mft").tracks.shape == (0, FRAMES, 2)
