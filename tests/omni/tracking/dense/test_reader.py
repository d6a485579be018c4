import numpy as np
import pytest
import torch

from omni.maths import grid_queries
from omni.tracking.dense import DenseReader, anchor_stage, answer_anchors, pixel_features
from omni.tracking.readout import Reader

TIMES = np.arange(6)
FRAME = 2


@pytest.fixture(scope="module")
def dense(fitted, tmp_path_factory):
    store = fitted.trainer.store
    reader = Reader(store, fitted.trainer.field.eval(), chunk=4096)
    stage = anchor_stage(tmp_path_factory.mktemp("anchors"), "key", store.size, store.num_frames)
    return DenseReader(store, answer_anchors(reader, FRAME, stage))


@pytest.fixture(scope="module")
def pixels(dense):
    """Tracks of all pixels of the original video, which is twice the processing size."""
    return dense.tracks(grid_queries(dense.video_size, FRAME, 1))


def test_pixels_of_both_layers_follow_their_own(dense, pixels, scene):
    xy = pixels.query_points[:, :0:-1] / 2
    expected = 2 * np.stack([scene.track(xy, FRAME, t) for t in TIMES], 1)
    square = scene.on_square(xy, FRAME)
    hidden = ~square[:, None] & np.stack([scene.on_square(expected[:, t] / 2, t) for t in TIMES], 1)
    height, width = dense.video_size
    visible = ~hidden & ((expected >= 0) & (expected <= (width, height))).all(-1)
    error = np.linalg.norm(pixels.tracks - expected, axis=-1)
    for layer in (square, ~square):
        seen = visible & layer[:, None]
        assert np.median(error[seen]) < 0.3 and np.quantile(error[seen], 0.9) < 2
    moved = np.linalg.norm(expected[:, 5] - expected[:, 0], axis=-1)
    assert np.median(moved) > 4, "there is motion"


def test_a_query_is_exactly_where_it_was_asked_for(pixels):
    np.testing.assert_allclose(pixels.tracks[:, FRAME], pixels.query_points[:, :0:-1], atol=1e-3)
    assert pixels.visible[:, FRAME].all() and (pixels.visibility[:, FRAME] == 1).all()


def test_the_pixels_within_a_processing_pixel_move_together(dense, pixels):
    height, width = dense.video_size
    moved = (pixels.tracks - pixels.tracks[:, [FRAME]]).reshape(height, width, 6, 2)
    blocks = moved.reshape(height // 2, 2, width // 2, 2, 6, 2)
    assert np.abs(blocks - blocks[:, :1, :, :1]).max() < 0.15, "but for the camera's turn"
    assert np.abs(np.diff(moved, axis=1)).max() > 3, "unlike those across a motion border"


@pytest.mark.parametrize("time", [0.0, 3.5, 5.0])
def test_one_time_is_answered_as_among_all(dense, pixels, time, monkeypatch):
    monkeypatch.setattr("omni.tracking.dense.reader.MARGIN", 3)
    queries = pixels.query_points[::3]
    one = dense.tracks(queries, np.array([time]))
    all_times = dense.tracks(queries, np.sort(np.append(TIMES, time)))
    column = int(np.searchsorted(TIMES, time))
    distance = np.linalg.norm(one.tracks[:, 0] - all_times.tracks[:, column], axis=-1)
    assert np.quantile(distance, 0.99) < 0.05
    assert (one.visible[:, 0] == all_times.visible[:, column]).mean() > 0.99


def test_chunks_and_threads_do_not_change_results(dense, pixels, monkeypatch):
    monkeypatch.setattr("omni.tracking.dense.reader.AT_ONCE", 600)
    monkeypatch.setattr(dense, "chunk", 700)
    monkeypatch.setattr("omni.system.threads.SMALLEST_PART", 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        parts = dense.tracks(pixels.query_points)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(parts.tracks, pixels.tracks, atol=1e-3)
    np.testing.assert_allclose(parts.visibility, pixels.visibility, atol=1e-4)


def test_features_of_some_rows_are_those_of_all(dense):
    xy = np.array([[3.5, 4.5], [17.5, 10.5], [22.5, 12.5]], np.float32)
    candidates, values = dense.candidates_of_pixels(xy)
    assert values.shape[:3] == (3, 6, 10) and torch.isfinite(values).all()
    chains, _ = dense._candidates_of_pixels(xy)
    rows = np.array([0, 2, 1, 2]), np.array([5, 0, 3, 3])
    some = pixel_features(candidates, chains, dense.frames, FRAME, rows)
    torch.testing.assert_close(some, values[rows])
