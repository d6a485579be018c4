import numpy as np
import pytest
import torch

from omni.errors import OmniError
from omni.maths import grid_queries
from omni.tracking.readout import Reader

TIMES = np.arange(6)


@pytest.fixture(scope="module")
def reader(fitted):
    return Reader(fitted.trainer.store, fitted.trainer.field.eval(), chunk=4096)


def queries_in(scene, frame, square):
    """Queries (t, y, x), original pixels (twice the processing size), on one layer in a frame."""
    x, y = np.meshgrid(np.arange(2.5, 30, 3), np.arange(2.5, 22, 3))
    xy = np.stack([x, y], -1).reshape(-1, 2)
    near = scene.on_square(xy, frame)
    margin = [
        scene.on_square(xy + offset, frame) == near
        for offset in np.array([[1.5, 0], [-1.5, 0], [0, 1.5], [0, -1.5]])
    ]
    xy = xy[np.all(margin, axis=0) & (near == square)]
    return np.concatenate([np.full((len(xy), 1), frame), 2 * xy[:, ::-1]], axis=1)


def truth(scene, queries):
    """(N, T, 2) original pixels, and whether the point is in the frame and not occluded."""
    xy = queries[:, :0:-1] / 2
    tracks = np.stack([scene.track(xy, queries[0, 0], t) for t in TIMES], 1)
    square = scene.on_square(xy, queries[0, 0])[:, None]
    occluded = ~square & np.stack([scene.on_square(tracks[:, t], t) for t in TIMES], 1)
    height, width = scene.size
    inside = ((tracks >= 0) & (tracks <= (width, height))).all(-1)
    return 2 * tracks, inside & ~occluded


@pytest.mark.parametrize("frame", [0, 3, 5])
@pytest.mark.parametrize("square", [True, False])
def test_tracks_follow_both_layers_forward_and_backward(reader, scene, frame, square):
    queries = queries_in(scene, frame, square)
    assert len(queries) >= 4
    expected, visible = truth(scene, queries)
    result = reader.tracks(queries)
    assert result.tracks.shape == (len(queries), 6, 2)
    distance = np.linalg.norm(result.tracks - expected, axis=-1)
    assert np.median(distance[visible]) < 0.2 and np.quantile(distance[visible], 0.95) < 1.5
    assert np.linalg.norm(expected[:, 5] - expected[:, 0], axis=-1).min() > 4, "there is motion"


def test_the_field_alone_follows_the_square(reader, scene):
    queries = queries_in(scene, 0, True)
    expected, visible = truth(scene, queries)
    estimate = reader.follow(queries.astype(np.float32), TIMES)
    distance = np.linalg.norm(2 * estimate.xy - expected, axis=-1)
    assert np.median(distance[visible]) < 0.5


def test_the_field_alone_maps_a_query_at_its_own_time_to_itself(reader, scene):
    queries = queries_in(scene, 2, False).astype(np.float32)
    queries[:, 0] = 2.5
    estimate = reader.follow(queries, np.array([2.5]))
    np.testing.assert_allclose(2 * estimate.xy[:, 0], queries[:, :0:-1], atol=1e-3)


@pytest.mark.parametrize("time, tolerance", [(0, 0.05), (2, 0.05), (5, 0.05), (1.5, 0.3)])
def test_a_query_at_its_own_time_returns_the_query_point(reader, scene, time, tolerance):
    """Original pixels. Between frames the smoothing curve is not pinned to the query."""
    queries = np.concatenate([queries_in(scene, 2, square) for square in (True, False)])
    queries[:, 0] = time
    result = reader.tracks(queries, times=np.array([time]))
    np.testing.assert_allclose(result.tracks[:, 0], queries[:, :0:-1], atol=tolerance)
    assert result.visible.all()


def test_tracks_between_frames_lie_on_the_true_path(reader, scene):
    queries = queries_in(scene, 0, True)
    between = np.array([0.5, 1.25, 2.5])
    result = reader.tracks(queries, times=between)
    expected = np.stack([scene.track(queries[:, :0:-1] / 2, 0, t) for t in between], 1)
    assert np.median(np.linalg.norm(result.tracks - 2 * expected, axis=-1)) < 0.2


def test_points_that_leave_the_frame_are_not_visible(reader, scene):
    queries = np.concatenate([queries_in(scene, 0, square) for square in (True, False)])
    result = reader.tracks(queries)
    _, visible = truth(scene, queries)
    x, y = np.moveaxis(result.tracks, -1, 0)
    outside = (x < 0) | (y < 0) | (x > 64) | (y > 48)
    assert outside.any() and not result.visible[outside].any()
    assert (result.visible == visible).mean() > 0.9


@pytest.mark.parametrize("chunk", [5, 64])
def test_chunking_does_not_change_results(reader, fitted, scene, chunk):
    queries = np.concatenate([queries_in(scene, frame, True)[:6] for frame in (0, 3)])
    whole = reader.tracks(queries)
    parts, done = Reader(fitted.trainer.store, reader.field, chunk), []
    result = parts.tracks(queries, progress=done.append)
    np.testing.assert_allclose(result.tracks, whole.tracks, atol=1e-3)
    np.testing.assert_allclose(result.visibility, whole.visibility, atol=1e-4)
    assert sum(done) == len(queries) and max(done) <= chunk
    for picture, part in zip(reader.render(1.5), parts.render(1.5), strict=True):
        np.testing.assert_allclose(picture, part, atol=1e-5)


@pytest.mark.parametrize("gathered, scored", [(1, 1), (2000, 500)])
def test_how_many_candidates_are_scored_at_once_does_not_change_results(
    reader, scene, monkeypatch, gathered, scored
):
    queries = np.concatenate([queries_in(scene, frame, True)[:6] for frame in (0, 3)])
    whole = reader.tracks(queries)
    monkeypatch.setattr("omni.tracking.readout.GATHERED", gathered)
    monkeypatch.setattr("omni.tracking.readout.SCORED", scored)
    parts = reader.tracks(queries)
    np.testing.assert_allclose(parts.tracks, whole.tracks, atol=1e-3)
    np.testing.assert_allclose(parts.visibility, whole.visibility, atol=1e-4)


def test_threads_do_not_change_results(reader, scene, monkeypatch):
    queries = np.concatenate([queries_in(scene, frame, True)[:6] for frame in (0, 3)])
    monkeypatch.setattr("omni.system.threads.SMALLEST_PART", 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append(reader.tracks(queries))
    finally:
        torch.set_num_threads(threads)
    one, five = results
    np.testing.assert_allclose(five.tracks, one.tracks, atol=1e-3)
    np.testing.assert_allclose(five.visibility, one.visibility, atol=1e-4)


def test_the_order_of_queries_is_kept(reader, scene):
    queries = np.concatenate([queries_in(scene, frame, True)[:3] for frame in (3, 0, 5)])
    mixed = queries[[4, 0, 8, 2, 6, 1, 3, 5, 7]]
    result = reader.tracks(mixed)
    for n, query in enumerate(mixed):
        alone = reader.tracks(query[None])
        np.testing.assert_allclose(result.tracks[n], alone.tracks[0], atol=1e-3)
    np.testing.assert_array_equal(result.query_points, mixed.astype(np.float32))


def test_no_queries_give_no_tracks(reader):
    assert reader.tracks(np.zeros((0, 3))).tracks.shape == (0, 6, 2)


def test_tracks_of_a_grid_lie_row_by_row(reader):
    result = reader.tracks(grid_queries(reader.video_size, 0, 16))
    assert result.tracks.shape == (12, 6, 2)
    np.testing.assert_allclose(result.tracks[:5, 0, 0], [8, 24, 40, 56, 8], atol=0.05)


@pytest.mark.parametrize(
    "query, words",
    [
        ([-0.1, 5, 5], "outside the time.*frames 0 to 5"),
        ([5.5, 5, 5], "outside the time"),
        ([0, -0.5, 5], "outside the frame.*64x48"),
        ([0, 48.5, 5], "outside the frame"),
        ([0, 5, 64.5], "outside the frame"),
        ([0, 5, np.nan], "finite"),
        ([0, 5], "finite numbers \\(N, 3\\)"),
    ],
)
def test_a_query_outside_the_video_is_refused_by_number(reader, query, words):
    good = [1, 5, 5][: len(query)]
    with pytest.raises(OmniError, match=words) as caught:
        reader.tracks(np.array([good, query]))
    assert "query 1" in str(caught.value) or "finite" in words


def test_the_picture_of_a_fitted_frame_resembles_it(reader, fitted):
    color, depth = reader.render(3)
    observed = fitted.trainer.store.frames[3] / 255
    assert color.shape == (24, 32, 3) and depth.shape == (24, 32)
    assert np.abs(color - observed).mean() < 0.9 * np.abs(observed - observed.mean((0, 1))).mean()
    assert reader.render(3, short_side=12)[0].shape == (12, 16, 3)


def test_the_square_lies_in_front_of_the_background(reader, scene):
    from omni.maths.coords import pixel_centers

    _, depth = reader.render(2)
    square = scene.on_square(pixel_centers(scene.size).astype(np.float64), 2)
    assert depth[square].mean() < depth[~square].mean() - 0.1


def test_without_a_field_tracks_are_the_chains_of_flows(fitted, scene):
    queries = queries_in(scene, 0, True)
    expected, visible = truth(scene, queries)
    result = Reader(fitted.trainer.store, None, 4096).tracks(queries)
    distance = np.linalg.norm(result.tracks - expected, axis=-1)
    assert np.median(distance[visible]) < 0.2


def test_velocity_is_that_of_the_layer_at_any_time(reader, scene):
    queries = queries_in(scene, 2, False).astype(np.float32)
    times = np.array([0.0, 1.5, 5.0])
    velocity = reader.velocity(queries, times)
    xy = queries[:, :0:-1] / 2
    for m, (time, low, high) in enumerate(zip(times, (0, 1, 4.9), (0.1, 2, 5), strict=True)):
        ends = [2 * scene.move(xy, 2, t, False) for t in (low, high)]
        true = (ends[1] - ends[0]) / (high - low)
        there = 2 * scene.move(xy, 2, time, False)
        clear = ((there > 6) & (there < 2 * np.array(scene.size)[::-1] - 6)).all(1)
        clear &= ~scene.on_square(there / 2, time) & ~scene.on_square(there / 2 + 3, time)
        clear &= ~scene.on_square(there / 2 - 3, time)
        assert clear.sum() > 10
        assert np.median(np.linalg.norm(velocity[:, m] - true, axis=1)[clear]) < 0.3
