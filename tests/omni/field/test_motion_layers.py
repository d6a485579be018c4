import numpy as np
import pytest
import torch

from omni.field.motion_layers import find_layers
from omni.field.sampling import LongTracks
from omni.maths.coords import normalize, pixel_centers
from omni.maths.quantisation import Evidence

SIZE, FRAMES, LAYERS, CELLS = (48, 64), 8, 3, 16
PATCH = slice(10, 26), slice(8, 24)
STILL = np.tile(np.eye(3)[:2], (FRAMES, 1, 1))


def moved(t):
    """Pixels by which the patch has moved since the first frame."""
    return np.array([3.0, 1.0]) * t


def shows_patch(t, xy):
    """Which points `(..., 2)`, in pixels, lie on the patch."""
    x, y = np.moveaxis(xy - moved(t), -1, 0)
    return (y > PATCH[0].start) & (y < PATCH[0].stop) & (x > PATCH[1].start) & (x < PATCH[1].stop)


@pytest.fixture
def store(write_store, tmp_path):
    pairs = [(i, j) for i in range(FRAMES) for j in (i - 4, i - 1, i + 1, i + 4) if 0 <= j < FRAMES]
    yes, no = np.ones(SIZE, bool), np.zeros(SIZE, bool)
    evidence = {pair: Evidence(np.zeros(SIZE), no, yes) for pair in pairs}
    on = [shows_patch(t, pixel_centers(SIZE))[..., None] for t in range(FRAMES)]
    flows = {(i, j): np.where(on[i], moved(j) - moved(i), 0.0) for i, j in pairs}
    frames = np.zeros((FRAMES, *SIZE, 3), np.uint8)
    return write_store(tmp_path, frames, pairs, flows, evidence)


def tracks(stride=2, hidden=()):
    """Points of the first frame, followed; those of the patch are not seen in `hidden` frames."""
    start = pixel_centers(SIZE, stride).reshape(-1, 2)
    patch = shows_patch(0, start)
    path = start[:, None] + patch[:, None, None] * np.stack([moved(t) for t in range(FRAMES)])
    seen = np.ones(path.shape[:2], np.float32)
    for t in hidden:
        seen[patch, t] = 0
    path, seen = torch.from_numpy(path).float(), torch.from_numpy(seen)
    return LongTracks(path, torch.ones_like(seen), seen)


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_a_patch_that_moves_is_a_layer_of_its_own_even_while_it_is_hidden(store, hidden):
    maps, shown = find_layers(store, STILL, tracks(hidden=hidden), LAYERS, CELLS)
    cells = pixel_centers((CELLS, CELLS)) * np.array(SIZE[::-1]) / CELLS
    for t in set(range(FRAMES)) - set(hidden):
        agree = (shown[t] < shown[t].max()) == shows_patch(t, cells)
        assert agree.mean() > 0.95
    nearest = maps[shown[0].min()]
    expected = normalize(moved(FRAMES // 2) - np.stack([moved(t) for t in range(FRAMES)]), SIZE) + 1
    np.testing.assert_allclose(nearest[:, :, 2], expected, atol=0.02)
    np.testing.assert_allclose(maps[:, :, :, :2] - np.eye(2), 0, atol=0.05)


def test_too_few_tracks_leave_everything_in_the_farthest_layer_at_rest(store):
    few = tracks(stride=32)
    maps, shown = find_layers(store, STILL, few, len(few.xy), CELLS)
    assert (shown == len(few.xy) - 1).all()
    np.testing.assert_array_equal(maps, np.broadcast_to(np.eye(3)[:2], maps.shape))


def test_frames_that_share_no_track_leave_layers_where_they_are(store):
    none = tracks()
    none.seen[:, 3:5] = 0
    maps, shown = find_layers(store, STILL, none, LAYERS, CELLS)
    assert np.isfinite(maps).all() and shown.max() < LAYERS
