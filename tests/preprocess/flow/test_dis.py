from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import texture

from omni.system.threads import single_threaded_opencv
from preprocess.flow.dis import DisFlow, _refine, _search
from preprocess.flow.frame import Frame

CLIP = Path(__file__).parents[3].parent / "shared/data/synthetic/dev/stack.npz"


def shifted(image, dx, dy):
    matrix = np.float32([[1, 0, dx], [0, 1, dy]])
    size = image.shape[1::-1]
    return cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REFLECT)


def test_translation_is_found_to_a_tenth_of_a_pixel():
    image = texture((80, 96))
    flow = DisFlow().estimate(image, shifted(image, 2.5, -1.25))
    error = np.linalg.norm(flow[15:-15, 15:-15] - np.float32([2.5, -1.25]), axis=-1)
    assert np.median(error) < 0.1


def test_a_good_initial_flow_rescues_a_motion_too_large_to_search():
    image = texture((96, 128))
    images = image, shifted(image, 40, 0)
    flow_init = np.broadcast_to(np.float32([39, 0.5]), (96, 128, 2)).copy()
    error = [
        np.median(np.abs(DisFlow().estimate(*images, given)[20:-20, :70] - np.float32([40, 0])))
        for given in (None, flow_init)
    ]
    assert error[0] > 5 and error[1] < 0.2


class Learned:
    """Stands in for a learned method that gives the same flow for every pair."""

    name, workers, batch = "learned-1", 1, 1

    def __init__(self, flow):
        self.flow = np.float32(flow)

    def estimate(self, image1, image2, flow_init=None):
        return np.broadcast_to(self.flow, (*image1.shape[:2], 2)).copy()


@pytest.mark.parametrize("flow_init", [None, np.zeros((96, 128, 2), np.float32)])
def test_a_learned_flow_is_a_start_for_what_nothing_else_finds(flow_init):
    image = texture((96, 128))
    images = image, shifted(image, 40, 0)
    mixed = DisFlow(learned=Learned([38.5, 1]))
    flow = mixed.estimate(*images, None if flow_init is None else flow_init.copy())
    assert np.median(np.abs(flow[20:-20, :70] - np.float32([40, 0]))) < 0.2
    assert mixed.name == "mixed-learned-1" and DisFlow().name == "dis-wide"


@pytest.mark.parametrize("flow_init", [None, np.full((96, 128, 2), 2, np.float32)])
def test_a_wrong_learned_flow_does_no_harm(flow_init):
    image = texture((96, 128))
    images = image, shifted(image, 2, 0)
    flows = [
        provider.estimate(*images, None if flow_init is None else flow_init.copy())
        for provider in (DisFlow(), DisFlow(learned=Learned([25, -25])))
    ]
    error = [np.abs(flow[20:-20, 20:-20] - np.float32([2, 0])).mean() for flow in flows]
    assert error[1] < error[0] + 0.02


def test_a_bad_initial_flow_does_no_harm():
    image = texture((96, 128))
    images = image, shifted(image, 2, 0)
    flow_init = np.full((96, 128, 2), 25, np.float32)
    flow = DisFlow().estimate(*images, flow_init)
    assert np.median(np.abs(flow[20:-20, 20:-20] - np.float32([2, 0]))) < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 5), (300, 2), (31, 33)])
def test_tiny_frames_give_finite_flow_of_their_size(size):
    provider = DisFlow()
    images = texture(size), texture(size, 1)
    flow = provider.estimate(*images)
    assert flow.shape == (*size, 2) and np.isfinite(flow).all()
    assert np.isfinite(provider.estimate(*images, flow)).all()


@pytest.mark.parametrize("values", [(0, 0), (90, 90), (0, 255)])
def test_constant_frames_do_not_move(values):
    images = (np.full((40, 50, 3), value, np.uint8) for value in values)
    assert np.abs(DisFlow().estimate(*images)).max() < 1e-3


def test_result_depends_on_the_arguments_alone():
    """OpenCV's DIS object keeps the initial flow of a guided search for the plain ones after it."""
    image = texture((64, 72))
    images = image, shifted(image, 3, 1)
    provider = DisFlow()
    expected = provider.estimate(*images)
    provider.estimate(*images, np.full((64, 72, 2), 20, np.float32))
    np.testing.assert_array_equal(provider.estimate(*images), expected)
    with single_threaded_opencv(), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: provider.estimate(*images), range(4)))
    for result in results:
        np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(not CLIP.exists(), reason="needs ../shared/data/synthetic")
def test_refinement_fills_textureless_areas_of_a_rendered_clip():
    clip = np.load(CLIP)
    video, valid = clip["video"][9:11], clip["flow_valid"][9]
    truth = clip["flow_fwd"][9].astype(np.float32)
    grays = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in video]
    plain, refined = (
        np.linalg.norm(flow - truth, axis=-1)[valid]
        for flow in (_search(*grays), DisFlow().estimate(*video))
    )
    assert np.median(refined) < 0.3 * np.median(plain)
    assert refined.mean() < 0.2


def test_a_frame_has_the_same_parts_in_any_order_and_leaves_its_image_alone():
    image = texture((64, 72))
    given, sizes = image.copy(), [(72, 64), (36, 32), (50, 45)]
    first, second = Frame(image), Frame(image)
    there = {size: first.smooth(size) for size in sizes}
    back = {size: second.smooth(size) for size in sizes[::-1]}
    for size in sizes:
        np.testing.assert_array_equal(there[size], back[size])
        assert there[size].shape == size[::-1] and first.smooth(size) is there[size]
    np.testing.assert_array_equal(image, given)


def test_refinement_leaves_the_shared_parts_of_a_frame_and_the_initial_flow_alone():
    image = texture((64, 72))
    frames = [Frame(image), Frame(shifted(image, 2, 1))]
    flow_init = np.ones((64, 72, 2), np.float32)
    once, again = (_refine(frames, flow_init, (0.5, 1.0)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    estimate = DisFlow().estimate(image, frames[1].image, flow_init)
    assert np.isfinite(estimate).all() and (flow_init == 1).all()
