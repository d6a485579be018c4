import numpy as np
import pytest

from omni.maths import Camera, normalize, pixel_centers
from omni.store import UNKNOWN
from omni.tracking.dense.anchors import Anchors, anchor_grid
from omni.tracking.dense.candidates import OWN, interpolated, pixel_candidates
from omni.tracking.selection import Selection

SIZE, FRAMES, FRAME = (256, 384), 5, 1
ALL = slice(0, FRAMES)


class Links:
    """A frame whose right half may have another mask label."""

    def __init__(self, labelled):
        self.size, self.labelled = SIZE, labelled

    def labels(self, frame, xy):
        return np.where(self.labelled & (xy[:, 0] > 192), 1, UNKNOWN).astype(np.uint8)


def turned(xy, frames):
    """(N, len(frames), 2) where points of FRAME are when everything turns and grows."""
    center = np.array([160.0, 120.0])
    angle, growth = 0.1 * (frames - FRAME), 1.03 ** (frames - FRAME)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (
        np.einsum("ijt,nj->nti", turn * growth, xy - center)
        + center
        + (2.0 * (frames - FRAME))[:, None]
    )


def camera_of(move):
    """The camera that moves as the affine `move` does."""
    corners = np.array([[0.0, 0.0], [384.0, 0.0], [0.0, 256.0]])
    moved = move(corners, np.arange(FRAMES))
    there = np.concatenate([normalize(corners, SIZE), np.ones((3, 1))], 1)
    maps = []
    for t in range(FRAMES):
        here = np.concatenate([normalize(moved[:, t], SIZE), np.ones((3, 1))], 1)
        maps.append((np.linalg.inv(here) @ there).T[:2])
    return Camera(np.array(maps), SIZE)


def still(xy, frames):
    return np.repeat(np.asarray(xy, np.float64)[:, None], len(frames), 1)


def anchors_of(move, links, trust=1.0):
    grid, pitch = anchor_grid(SIZE)
    xy = grid.reshape(-1, 2)
    shape = (len(xy), FRAMES)
    values = [np.full(shape, value, np.float32) for value in (trust, 0.8, 0.5)]
    selected = Selection(move(xy, np.arange(FRAMES)).astype(np.float32), *values)
    return Anchors(FRAME, pitch, grid.shape[1], links.labels(FRAME, xy), selected)


PIXELS = pixel_centers(SIZE)[32:224:20, 32:352:3].reshape(-1, 2)


def test_offsets_to_anchors_turn_and_scale_with_the_camera():
    links = Links(False)
    anchors = anchors_of(turned, links)
    own = turned(PIXELS, np.arange(FRAMES)).astype(np.float32)
    candidates = pixel_candidates(anchors, own, camera_of(turned), links)
    assert candidates.xy.shape == (10, len(PIXELS), FRAMES, 2) and candidates.valid.all()
    distance = np.linalg.norm(candidates.xy - candidates.xy[OWN], axis=-1)
    assert distance.max() < 1e-3
    assert np.linalg.norm(candidates.offset[1:], axis=-1).min() < anchors.pitch


def test_the_mean_of_four_anchors_is_exact_for_affine_motion_of_an_object():
    links = Links(False)
    selection, enough = interpolated(
        anchors_of(turned, links), PIXELS, camera_of(still), links, ALL
    )
    assert enough.all()
    np.testing.assert_allclose(selection.xy, turned(PIXELS, np.arange(FRAMES)), atol=1e-3)
    np.testing.assert_allclose(selection.visibility, 0.8, atol=1e-6)
    np.testing.assert_allclose(selection.sigma, 0.5, atol=1e-6)


def test_only_the_frames_asked_for_are_answered():
    links, camera = Links(False), camera_of(turned)
    anchors = anchors_of(turned, links)
    whole, _ = interpolated(anchors, PIXELS, camera, links, ALL)
    part, enough = interpolated(anchors, PIXELS, camera, links, slice(3, 5))
    assert enough.shape == (len(PIXELS), 2)
    np.testing.assert_array_equal(part.xy, whole.xy[:, 3:])


def apart(xy, frames):
    """The right half moves away."""
    return still(xy, frames) + (xy[:, :1] > 192)[:, None] * 3.0 * (frames - FRAME)[:, None]


def test_anchors_on_both_sides_of_a_motion_border_are_not_enough():
    links = Links(False)
    anchors, camera = anchors_of(apart, links), camera_of(still)
    _, enough = interpolated(anchors, PIXELS, camera, links, ALL)
    border = np.abs(PIXELS[:, 0] - 192) < anchors.pitch / 2
    assert border.any() and not enough[border][:, 3:].any() and enough[border][:, FRAME].all()
    assert enough[np.abs(PIXELS[:, 0] - 192) > 2 * anchors.pitch].all()


def test_where_no_anchor_is_likely_to_be_visible_their_mean_is_enough():
    links = Links(False)
    anchors = anchors_of(apart, links, trust=0.05)
    assert interpolated(anchors, PIXELS, camera_of(still), links, ALL)[1].all()


@pytest.mark.parametrize("labelled", [False, True])
def test_anchors_on_another_masked_object_do_not_count(labelled):
    links, camera = Links(labelled), camera_of(still)
    anchors = anchors_of(apart, links)
    selection, enough = interpolated(anchors, PIXELS, camera, links, ALL)
    error = np.linalg.norm(selection.xy - apart(PIXELS, np.arange(FRAMES)), axis=-1)
    assert (error.max() < 1e-3 and enough.all()) == labelled
    candidates = pixel_candidates(
        anchors, apart(PIXELS, np.arange(FRAMES)).astype(np.float32), camera, links
    )
    assert candidates.valid[1:].all() == (not labelled)
    same = np.linalg.norm(candidates.xy - candidates.xy[OWN], axis=-1).max(-1) < 1e-3
    assert same[candidates.valid].all() == labelled
