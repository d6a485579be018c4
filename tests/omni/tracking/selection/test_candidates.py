import numpy as np
import pytest

from omni.evaluation.baselines import baseline
from omni.field.initialisation import global_motion
from omni.maths.camera import Camera
from omni.tracking.fusion import FieldEstimate
from omni.tracking.integration import LOST, STRICT, integrate
from omni.tracking.landmarks import Landmarks
from omni.tracking.links import Links
from omni.tracking.selection.candidates import (
    FIELD,
    FUSED,
    NUM_CANDIDATES,
    SOURCES,
    STENCIL,
    _nodes,
    gather_candidates,
)
from omni.tracking.selection.flow_tracks import trace


@pytest.fixture(scope="module")
def candidates_of(small_store):
    """Candidates of points (N, 2) of frames (N,), and the points' own chains."""

    def gather(frames, xy):
        store = small_store
        links, landmarks = Links(store), Landmarks(store)
        chains = integrate(links, frames, xy, landmarks)
        path = chains.xy.transpose(1, 0, 2) + 0.25
        field = FieldEstimate(path + 1, np.ones(path.shape[:2], np.float32))
        camera = Camera(global_motion(store, store.meta("evidence")["threshold"]), store.size)
        return (
            gather_candidates(store, camera, landmarks, chains, path, field, frames),
            chains,
            path,
        )

    return gather


@pytest.fixture(scope="module")
def everywhere(scene):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, scene.num_frames, 60)
    xy = rng.uniform(0.5, np.array(scene.size[::-1]) - 0.5, (60, 2)).astype(np.float32)
    return frames, xy


def test_the_first_candidates_are_fused_path_field_and_flow_alone(
    small_store, candidates_of, everywhere
):
    frames, xy = everywhere
    candidates, chains, path = candidates_of(frames, xy)
    assert candidates.xy.shape == (NUM_CANDIDATES, 60, 6, 2) and candidates.level.shape == (
        NUM_CANDIDATES,
        60,
        6,
    )
    np.testing.assert_array_equal(candidates.level[FUSED], chains.level.T)
    np.testing.assert_array_equal(candidates.xy[FUSED, np.arange(60), frames], xy)
    others = np.arange(6) != frames[:, None]
    np.testing.assert_array_equal(candidates.xy[FUSED][others], path[others])
    np.testing.assert_allclose(candidates.xy[FIELD], path + 1)
    assert (candidates.level[FIELD] == LOST).all() and np.isinf(candidates.sigma[FIELD]).all()
    queries = np.concatenate([frames[:, None], 2 * xy[:, ::-1]], axis=1)
    for k, method in enumerate(SOURCES[2:], 2):
        expected = baseline(small_store, queries, method)
        np.testing.assert_allclose(2 * candidates.xy[k], expected.tracks, atol=1e-4)
        np.testing.assert_array_equal(candidates.level[k] > LOST, expected.visible)


def test_neighbours_on_the_same_surface_agree_with_the_truth(scene, candidates_of, everywhere):
    """The camera of the scene turns and pans: offsets must rotate with it."""
    frames, xy = everywhere
    candidates, _, _ = candidates_of(frames, xy)
    node = xy + candidates.offset[len(SOURCES) :]
    square = np.stack([scene.on_square(xy[n], frames[n]) for n in range(60)])
    same = np.stack([[scene.on_square(p, f) for p, f in zip(c, frames, strict=True)] for c in node])
    same = same == square
    truth = np.stack([scene.track(xy[n], frames[n], t) for n in range(60) for t in range(6)])
    off = np.linalg.norm(candidates.xy[len(SOURCES) :] - truth.reshape(60, 6, 2), axis=-1)
    good = (same & ~square & candidates.valid[len(SOURCES) :])[..., None] & (
        candidates.level[len(SOURCES) :] == STRICT
    )
    assert good.sum() > 2000
    # The fitted camera is not exact; without it an offset of 16 pixels turns by more than this.
    assert np.median(off[good]) < 0.1 and np.quantile(off[good], 0.95) < 0.7


def test_points_close_to_each_other_share_their_nodes(small_store):
    links = Links(small_store)
    height, width = links.size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    xy = np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)
    (frames, place), index, offset, valid = _nodes(links, np.full(len(xy), 2), xy)
    pitch = 4 * height / 256
    assert len(place) == np.ceil(height / pitch) * np.ceil(width / pitch)
    assert set(frames) == {2} and index.shape == valid.shape == (len(STENCIL), len(xy))
    reached = place[index] - xy
    np.testing.assert_allclose(reached[valid], offset[valid], atol=1e-5)
    assert valid[0].all(), "every point has a neighbour"
    assert not valid[:, 0].all(), "a corner has none outside the frame"


def test_a_point_in_a_cell_cut_by_the_border_has_a_node(small_store):
    links = Links(small_store)
    links.size = (23, 31)
    xy = np.array([[30.9, 22.9]], np.float32)
    (_, place), index, _, valid = _nodes(links, np.array([0]), xy)
    assert valid[0, 0] and (place[index[0, 0]] <= (30.5, 22.5)).all()


def test_neighbours_on_another_masked_object_are_not_valid(small_store, monkeypatch):
    links = Links(small_store)
    monkeypatch.setattr(links, "labels", lambda frame, xy: (xy[:, 0] > 16).astype(np.uint8))
    xy = np.array([[15.9, 12], [16.1, 12]], np.float32)
    nodes, index, offset, valid = _nodes(links, np.array([1, 1]), xy)
    side = (xy + offset)[..., 0] > 16
    assert not (valid & (side != [False, True])).any()
    assert (valid & (side == [False, True])).any(0).all()


def test_trace_keeps_the_order_of_points(small_store, everywhere):
    frames, xy = everywhere
    whole = trace(small_store, frames, xy, "mft")
    for n in (0, 17, 59):
        alone = trace(small_store, frames[n : n + 1], xy[n : n + 1], "mft")
        for one, all_of_them in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(one[0], all_of_them[n])
