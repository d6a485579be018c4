import cv2
import numpy as np
import pytest
from pictures import texture

from preprocess.flow.blockmatch import _DISPLACEMENTS, block_match
from preprocess.flow.dis import DisFlow, _search
from preprocess.flow.frame import features
from preprocess.flow.photoconsistency import mismatch

SIZE = (256, 320)
SQUARE = np.s_[100:124, 60:84]
INNER = np.s_[104:120, 64:80]


def sliding(motion):
    """Two frames of a small square on a background that stands still."""
    first, cover = texture(SIZE), texture(SIZE, 1)
    second, (dx, dy) = first.copy(), motion
    first[SQUARE] = cover[SQUARE]
    second[100 + dy : 124 + dy, 60 + dx : 84 + dx] = cover[SQUARE]
    return first, second


@pytest.mark.parametrize("motion", [(30, 0), (-26, 18), (2, -32)])
def test_a_small_object_is_found_up_to_the_documented_reach(motion):
    flow = block_match(*sliding(motion))
    assert flow.shape == (*SIZE, 2) and flow.dtype == np.float32
    assert np.abs(np.median(flow[INNER], axis=(0, 1)) - motion).max() <= 1
    assert np.median(np.abs(flow[:90]), axis=(0, 1)).max() == 0, "the background stands still"


def test_at_other_sizes_the_reach_is_the_same_share_of_the_short_side():
    large = [cv2.resize(image, (640, 512)) for image in sliding((30, 0))]
    flow = block_match(*large)
    assert np.abs(np.median(flow[208:240, 128:160], axis=(0, 1)) - (60, 0)).max() <= 2


def test_where_there_is_no_texture_nothing_moves():
    gray = np.full((70, 90, 3), 120, np.uint8)
    assert (block_match(gray, gray) == 0).all()


def test_flow_of_a_small_object_that_moves_by_more_than_its_size_is_exact():
    """Coarse-to-fine search alone fails: at the scale of its motion the object has vanished."""
    motion = np.float32([-26, 18])
    flow = DisFlow().estimate(*sliding((-26, 18)))
    assert np.median(np.linalg.norm(flow[INNER] - motion, axis=-1)) < 0.1
    grays = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in sliding((-26, 18))]
    coarse_to_fine = _search(*grays)
    assert np.median(np.linalg.norm(coarse_to_fine[INNER] - motion, axis=-1)) > 5


@pytest.mark.parametrize("size", [(50, 60), (33, 7), (2, 90)])
def test_of_all_displacements_the_first_of_the_least_cost_is_chosen(size):
    images = texture(size), cv2.blur(np.roll(texture(size), (1, -2), (0, 1)), (5, 5))
    source, target = map(features, images)
    padded = np.pad(target, ((16, 16), (16, 16), (0, 0)), "edge")
    costs = []
    for dx, dy in _DISPLACEMENTS + 16:
        moved = padded[dy : dy + size[0], dx : dx + size[1]]
        apart = mismatch(cv2.split(cv2.absdiff(source, np.ascontiguousarray(moved))))
        costs.append(cv2.blur(apart.astype(np.float32), (7, 7)))
    expected = _DISPLACEMENTS[np.argmin(costs, axis=0)]
    np.testing.assert_array_equal(block_match(*images), expected)
