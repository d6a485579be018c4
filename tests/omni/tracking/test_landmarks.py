import numpy as np
import pytest

from omni.tracking.integration import LOST, STRICT, integrate
from omni.tracking.landmarks import FEWEST, REACH, Landmarks, transfer
from omni.tracking.links import Links
from omni.tracking.tracks import Tracks
from preprocess.flow.pairs import schedule

TURN = np.array([[0.9, -0.3], [0.3, 0.9]])


def around(count, seed=0, size=60):
    return np.random.default_rng(seed).uniform(0, size, (count, 2))


def imported(tracks, size, visible=None):
    shape = tracks.shape[:2]
    return Tracks(
        tracks=tracks.astype(np.float32),
        visible=np.ones(shape, bool) if visible is None else visible,
        visibility=np.ones(shape, np.float32),
        sigma=np.full(shape, np.nan, np.float32),
        query_points=np.zeros((len(tracks), 3), np.float32),
        size=size,
        fps=25.0,
    )


def test_points_move_with_an_affine_motion_of_their_landmarks():
    source, xy = around(300), around(50, 1, 40) + 10
    arrived, sigma = transfer(xy, source, source @ TURN.T + 7, 0.5, 24.0)
    np.testing.assert_allclose(arrived, xy @ TURN.T + 7, atol=0.15)
    assert (sigma >= 0.5).all() and (sigma < 1.2).all()


def test_one_outlier_in_six_landmarks_does_not_move_a_point():
    source, xy = around(300), around(50, 1, 40) + 10
    target = source + 5
    wrong = np.arange(0, 300, 8)
    target[wrong] += np.random.default_rng(2).uniform(10, 40, (len(wrong), 2))
    arrived, sigma = transfer(xy, source, target, 0.5, 24.0)
    known = np.isfinite(sigma)
    assert known.mean() > 0.7
    assert np.quantile(np.linalg.norm(arrived - xy - 5, axis=1)[known], 0.95) < 0.2


def test_across_a_motion_border_two_motions_are_never_mixed():
    source = around(400)
    target = source + np.where(source[:, :1] < 30, [9.0, 0.0], [-9.0, 0.0])
    border = np.stack([np.full(20, 30.0), np.linspace(10, 50, 20)], axis=1)
    arrived, sigma = transfer(border, source, target, 0.5, 24.0)
    inner, clear = transfer(border - [15, 0], source, target, 0.5, 24.0)
    assert np.isinf(sigma).any() and np.isfinite(clear).all()
    moved = np.abs((arrived - border)[np.isfinite(sigma)])
    np.testing.assert_allclose(moved, np.broadcast_to([9, 0], moved.shape), atol=0.5)
    np.testing.assert_allclose(inner, border - [6, 0], atol=1e-3)


@pytest.mark.parametrize("count", [0, 1, FEWEST - 1])
def test_too_few_landmarks_give_no_estimate(count):
    xy = around(5)
    arrived, sigma = transfer(xy, around(count, 3), around(count, 4), 0.5, 24.0)
    assert np.isinf(sigma).all() and arrived.shape == (5, 2)


def test_far_away_landmarks_give_no_estimate():
    _, sigma = transfer(around(5) + 500, around(100), around(100), 0.5, REACH)
    assert np.isinf(sigma).all()


@pytest.fixture(scope="module")
def cut_store(scene, write_store, tmp_path_factory):
    """The scene without any flow between frames 2 and 3: every chain ends there."""
    pairs = [tuple(map(int, p)) for p in schedule(scene.num_frames, "log", 4, cuts=[3])]
    frames = np.stack([scene.frame(t) for t in range(scene.num_frames)])
    flows = {pair: scene.flow(*pair) for pair in pairs}
    return write_store(tmp_path_factory.mktemp("cut"), frames, pairs, flows)


def test_imported_tracks_continue_points_where_no_flow_is_stored(scene, cut_store):
    height, width = scene.size
    grid = np.stack(np.meshgrid(np.arange(0.5, width), np.arange(0.5, height)), -1)
    grid = grid.reshape(-1, 2)
    grid = grid[~scene.on_square(grid, 0)]
    tracks = np.stack([scene.move(grid, 0, t, False) for t in range(6)], axis=1)
    there = np.stack([~scene.on_square(tracks[:, t], t) for t in range(6)], axis=1)
    landmarks = Landmarks(cut_store, imported(2 * tracks, (2 * height, 2 * width), there))
    xy = np.array([[6.0, 6.0], [5.0, 12.0]], np.float32)
    frames = np.zeros(2, int)
    alone = integrate(Links(cut_store), frames, xy)
    helped = integrate(Links(cut_store), frames, xy, landmarks)
    assert (alone.level[3:] == LOST).all() and (helped.level == STRICT).all()
    expected = np.stack([scene.move(xy, 0, t, False) for t in range(6)])
    assert np.linalg.norm(helped.xy - expected, axis=-1).max() < 0.3
    assert helped.sigma[3:].min() > 0.2


def test_landmarks_never_put_a_point_on_another_label(scene, write_store, tmp_path):
    """Exact flows, but in the user's masks the right half is another object from frame 3 on."""
    pairs = [tuple(map(int, p)) for p in schedule(scene.num_frames, "log", 4)]
    frames = np.stack([scene.frame(t) for t in range(scene.num_frames)])
    store = write_store(tmp_path, frames, pairs, {pair: scene.flow(*pair) for pair in pairs})
    masks = np.zeros(frames.shape[:3], np.uint8)
    masks[3:, :, 16:] = 1
    with store.stage("masks", "k", {"masks": (masks.shape, np.uint8)}, 1) as stage:
        stage.arrays["masks"][:] = masks
    xy = np.array([[6.0, 20.0], [27.0, 20.0]], np.float32)
    chains = integrate(Links(store), np.zeros(2, int), xy)
    assert (chains.level[:, 0] == STRICT).all()
    assert (chains.level[:3, 1] == STRICT).all() and (chains.level[3:, 1] == LOST).all()
    masks[3:, :, 16:] = 255
    store = write_store(tmp_path / "unknown", frames, pairs, {p: scene.flow(*p) for p in pairs})
    with store.stage("masks", "k", {"masks": (masks.shape, np.uint8)}, 1) as stage:
        stage.arrays["masks"][:] = masks
    assert (integrate(Links(store), np.zeros(2, int), xy).level == STRICT).all()
