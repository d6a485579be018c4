"""Ground truth of every kind is read into one convention; hostile files do nothing."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from omni.errors import OmniError
from omni.evaluation.truth import load_prediction, load_truth
from omni.tracking.tracks import Tracks

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def data_file(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path


def clip(seed=0, points=3, frames=4, size=(6, 8)):
    rng = np.random.default_rng(seed)
    occluded = np.zeros((points, frames), bool)
    occluded[0, 0] = occluded[1, :] = True
    return {
        "video": rng.integers(0, 255, (frames, *size, 3), dtype=np.uint8),
        "points": rng.random((points, frames, 2)),
        "occluded": occluded,
    }


def write_pickle(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def test_a_synthetic_clip_has_its_size_from_the_video():
    truth = load_truth(data_file("synthetic/dev/curtain.npz"))
    assert truth.size == (256, 256)
    assert truth.tracks.shape == (256, 36, 2) and truth.annotated.all()
    assert truth.mask_area is None
    row, frame = np.arange(256), truth.query_points[:, 0].astype(int)
    xy = truth.tracks[row, frame]
    np.testing.assert_allclose(xy, truth.query_points[:, :0:-1], atol=1e-3)


def test_joints_are_annotated_in_few_frames_and_come_with_mask_areas():
    truth = load_truth(data_file("real/camel/truth.npz"))
    assert truth.size == (480, 854) and truth.mask_area.shape == (90,)
    assert 0 < truth.annotated.mean() < 0.5
    assert np.isfinite(truth.tracks[truth.annotated]).all()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_clip_is_chosen_by_name_and_scaled_to_its_frames(tmp_path, protocol):
    clips = {"bear": clip(0), "goat": clip(1)}
    path = write_pickle(tmp_path / "davis.pkl", clips, protocol)
    truth = load_truth(f"{path}:goat")
    assert truth.size == (6, 8)
    kept = [0, 2]  # the second point is never visible
    expected = clips["goat"]["points"][kept] * [8, 6]
    np.testing.assert_allclose(truth.tracks, expected, rtol=1e-6)
    np.testing.assert_array_equal(truth.visible, ~clips["goat"]["occluded"][kept])
    assert truth.query_points[:, 0].tolist() == [1, 0]
    np.testing.assert_allclose(truth.query_points[0, :0:-1], expected[0, 1], rtol=1e-6)


def test_clips_of_a_list_are_named_by_index_and_fortran_arrays_keep_their_order(tmp_path):
    clips = [clip(0), clip(1)]
    clips[1]["points"] = np.asfortranarray(clips[1]["points"].astype(">f4"))
    path = write_pickle(tmp_path / "stacking.pkl", clips)
    expected = clips[1]["points"][[0, 2]] * [8, 6]
    np.testing.assert_allclose(load_truth(f"{path}:1").tracks, expected, rtol=1e-6)
    with pytest.raises(OmniError, match="stacking.pkl:NAME, NAME one of 0, 1"):
        load_truth(path)
    with pytest.raises(OmniError, match="NAME one of 0, 1"):
        load_truth(f"{path}:2")


def test_a_pickle_of_one_clip_needs_no_name(tmp_path):
    path = write_pickle(tmp_path / "one.pkl", {"goat": clip()})
    np.testing.assert_array_equal(load_truth(path).tracks, load_truth(f"{path}:goat").tracks)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/omni-evil-was-here",)


class ForgedDtype:
    """A dtype whose state claims that it holds Python objects."""

    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


@pytest.mark.parametrize(
    "payload",
    [Evil(), {"goat": Evil()}, {"goat": {"points": Evil()}}, np.array([Evil()], object)],
)
def test_a_pickle_cannot_call_anything(tmp_path, payload):
    path = write_pickle(tmp_path / "evil.pkl", payload)
    with pytest.raises(OmniError, match="is no TAP-Vid pickle of plain arrays"):
        load_truth(path)
    assert not os.path.exists("/tmp/omni-evil-was-here")


@pytest.mark.parametrize("payload", [ForgedDtype(), np.float64(1), {"a": np.array(["text"])}])
def test_a_pickle_cannot_build_anything_but_arrays_of_numbers(tmp_path, payload):
    with pytest.raises(OmniError, match="is not allowed"):
        load_truth(write_pickle(tmp_path / "odd.pkl", payload))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"hello", pickle.dumps({"a": clip()})[:-60]])
def test_a_damaged_pickle_is_one_clear_error(tmp_path, content):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    with pytest.raises(OmniError, match="broken.pkl is no TAP-Vid pickle"):
        load_truth(path)


def test_a_text_that_a_pickle_decodes_over_and_over_is_refused(tmp_path):
    """A megabyte in the file, a terabyte in memory."""
    text, million = b"x" * 1000000, 1 << 20
    head = b"\x80\x04]\x94(c_codecs\nencode\n\x94X" + len(text).to_bytes(4, "little") + text
    head += b"\x94X\x06\x00\x00\x00latin1\x94\x86R"
    again = b"h\x01h\x02h\x03\x86R"
    path = tmp_path / "bomb.pkl"
    path.write_bytes(head + again * million + b"e.")
    with pytest.raises(OmniError, match="only as many latin1 bytes as the file has"):
        load_truth(path)


def test_wrong_structure_says_what_is_missing(tmp_path):
    incomplete = {"goat": {"points": np.zeros((2, 3, 2))}}
    with pytest.raises(OmniError, match="clip goat lacks the arrays points and occluded"):
        load_truth(write_pickle(tmp_path / "a.pkl", incomplete))
    with pytest.raises(OmniError, match="must hold a dict or list of clips"):
        load_truth(write_pickle(tmp_path / "b.pkl", 3))
    with pytest.raises(OmniError, match="cannot be read"):
        load_truth(tmp_path / "none.pkl")
    with pytest.raises(OmniError, match="does not exist"):
        load_truth(tmp_path / "none.npz")


def test_an_npz_of_wrong_shapes_is_refused(tmp_path):
    good = {
        "tracks": np.zeros((2, 3, 2)),
        "visible": np.ones((2, 3), bool),
        "query_points": np.zeros((2, 3)),
        "size": np.array([4, 4]),
    }
    path = tmp_path / "truth.npz"

    def load(**changes):
        np.savez(
            path, **{key: value for key, value in (good | changes).items() if value is not None}
        )
        return load_truth(path)

    assert load().query_points.dtype == np.float32
    assert load(query_points=None).query_points.shape == (2, 3)
    for changes, message in (
        ({"size": None}, "lacks size"),
        ({"visible": np.ones((3, 2), bool)}, r"visible and annotated \(N, T\)"),
        ({"tracks": np.zeros((2, 3, 3))}, r"tracks must be \(N, T, 2\)"),
        ({"query_points": np.zeros((3, 3))}, "one for each track"),
        ({"query_points": np.full((2, 3), 7.0)}, "with t from 0 to 2"),
        ({"mask_area": np.ones(2)}, "one area for each of 3 frames"),
    ):
        with pytest.raises(OmniError, match=message):
            load(**changes)


def test_cotracker_arrays_move_by_half_a_pixel_and_change_their_axes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "pred_tracks": rng.random((1, 5, 3, 2)),
        "pred_visibility": rng.random((1, 5, 3, 1)),
        "queries": np.array([[[2.0, 10.0, 20.0]] * 3]),
        "size": np.array([30, 40]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    tracks = load_prediction(tmp_path / "a.npz")
    assert tracks.size == (30, 40) and tracks.query_points[0].tolist() == [2, 20.5, 10.5]
    expected = arrays["pred_tracks"][0].swapaxes(0, 1) + 0.5
    np.testing.assert_allclose(tracks.tracks, expected, rtol=1e-6)
    np.testing.assert_array_equal(tracks.visible, arrays["pred_visibility"][0, ..., 0].T > 0.5)
    assert np.isnan(tracks.sigma).all()
    arrays |= {"pred_tracks": arrays["pred_tracks"][0], "pred_visibility": tracks.visible.T}
    np.savez(tmp_path / "b.npz", **arrays)
    again = load_prediction(tmp_path / "b.npz")
    np.testing.assert_array_equal(again.tracks, tracks.tracks)
    np.testing.assert_array_equal(again.visible, tracks.visible)


def test_incomplete_cotracker_arrays_say_what_to_add(tmp_path):
    arrays = {"pred_tracks": np.zeros((1, 5, 3, 2)), "pred_visibility": np.ones((1, 5, 3), bool)}
    np.savez(tmp_path / "a.npz", **arrays, queries=np.zeros((1, 3, 3)))
    with pytest.raises(OmniError, match="lacks size: save it beside pred_tracks"):
        load_prediction(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **arrays, queries=np.zeros((1, 4, 3)), size=[3, 4])
    with pytest.raises(OmniError, match="queries must be"):
        load_prediction(tmp_path / "b.npz")
    arrays["pred_tracks"] = np.zeros((2, 5, 3, 2))
    np.savez(tmp_path / "c.npz", **arrays, queries=np.zeros((1, 3, 3)), size=[3, 4])
    with pytest.raises(OmniError, match="pred_tracks must be"):
        load_prediction(tmp_path / "c.npz")


def test_our_own_tracks_are_predictions_too(tmp_path):
    ones = np.ones((2, 3), np.float32)
    tracks = Tracks(
        np.ones((2, 3, 2), np.float32), ones > 0, ones, ones, np.ones((2, 3), np.float32), (4, 5), 9
    )
    tracks.save(tmp_path / "tracks.npz")
    assert load_prediction(tmp_path / "tracks.npz").size == (4, 5)
