import cv2
import numpy as np
import pytest
from pictures import texture

from preprocess.flow.frame import Frame, features
from preprocess.flow.photoconsistency import QUARTER, PhotoConsistency, mismatch
from preprocess.flow.warp import sample

SIZE = (96, 128)
SQUARE = np.s_[30:66, 40:90]
MOTION = np.float32([[-2, 1], [5, -3]])
"""Pixels by which the background and the square move."""


@pytest.fixture(scope="module")
def scene():
    """Two frames of a square that slides over a background, the true flow, and the square."""
    background, cover, on = texture(SIZE), texture(SIZE, 1), np.zeros(SIZE, np.uint8)
    on[SQUARE] = 1
    moved = [
        cv2.warpAffine(image, np.float32([[1, 0, dx], [0, 1, dy]]), SIZE[::-1])
        for image, (dx, dy) in ((background, MOTION[0]), (cover, MOTION[1]), (on, MOTION[1]))
    ]
    first = np.where(on[..., None] == 1, cover, background)
    second = np.where(moved[2][..., None] == 1, moved[1], moved[0])
    return first, second, MOTION[on], on == 1


@pytest.fixture
def pair():
    """Two frames of strong texture that have little in common."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    return [cv2.addWeighted(texture(SIZE), 0.5, n, 0.5, 0) for n in noise]


def consistency_of(first, second):
    return PhotoConsistency(Frame(first), Frame(second))


def border(on, width):
    kernel = np.ones((2 * width + 1, 2 * width + 1))
    return cv2.morphologyEx(on.astype(np.uint8), cv2.MORPH_GRADIENT, kernel) > 0


def test_only_the_true_flow_costs_nothing(scene):
    first, second, truth, on = scene
    consistency = consistency_of(first, second)
    inner = on & ~border(on, 7)
    assert consistency.cost(truth)[inner].max() < 0.1
    assert consistency.cost(truth + np.float32([1, 0]))[inner].min() > 1


def test_flow_that_leaked_across_a_border_is_taken_back(scene):
    first, second, truth, on = scene
    leaked = cv2.blur(truth, (11, 11))
    sharp = consistency_of(first, second).propagate(leaked)
    near = border(on, 6)
    before, after = (np.linalg.norm(flow - truth, axis=-1)[near] > 1 for flow in (leaked, sharp))
    assert before.mean() > 0.5
    assert after.mean() < 0.35 * before.mean(), "what is left is mostly hidden in the target"


def test_flow_is_taken_over_from_as_far_as_its_documentation_says(scene):
    first, second, truth, _ = scene
    holed = truth.copy()
    holed[:, 100:118] = 30
    sharp = consistency_of(first, second).propagate(holed)
    assert (np.abs(sharp - truth).max(-1)[10:-10, 100:118] < 0.1).mean() > 0.9


def test_the_first_of_equals_is_chosen_and_handicaps_decide(scene):
    first, second, truth, on = scene
    consistency = consistency_of(first, second)
    wrong = truth + np.float32([3, 0])
    inner = on & ~border(on, 7)
    assert (consistency.choose([wrong, truth], [0, 0]) == truth)[inner].all()
    assert (consistency.choose([truth, truth + 0], [0, 0]) == truth).all()
    assert (consistency.choose([wrong, truth], [0, 1000]) == wrong).all()


def test_where_nothing_can_be_seen_nothing_is_taken_over():
    gray = np.full((*SIZE, 3), 90, np.uint8)
    flow = np.random.default_rng(0).normal(0, 3, (*SIZE, 2)).astype(np.float32)
    np.testing.assert_array_equal(consistency_of(gray, gray).propagate(flow), flow)


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (33, 5)])
def test_frames_smaller_than_the_reach_stay_finite(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    flow = consistency_of(*images).propagate(np.ones((*size, 2), np.float32))
    assert flow.shape == (*size, 2) and np.isfinite(flow).all()


def test_mismatch_is_the_capped_difference_of_colour_and_gradient(pair):
    apart = np.abs(np.subtract(*map(features, pair), dtype=np.float32))
    color, gradient = apart[..., :2].mean(-1), apart[..., 2:].mean(-1)
    expected = 0.5 * np.minimum(color, 24) + np.minimum(gradient, 8)
    found = mismatch(cv2.split(apart.astype(np.uint8))) * QUARTER
    np.testing.assert_array_equal(found, expected)
    assert expected.max() == 20 and expected.min() < 4, "both capped and not"


@pytest.mark.parametrize("radius", [1, 3])
def test_cost_is_the_guided_filter_to_the_bit(pair, radius):
    source, target = map(features, pair)
    flow = np.random.default_rng(1).normal(0, 4, (*SIZE, 2)).astype(np.float32)

    def mean(values):
        return cv2.blur(values, (2 * radius + 1, 2 * radius + 1))

    cost = mismatch(cv2.split(cv2.absdiff(source, sample(target, flow)))) * QUARTER
    guide = source[..., 0].astype(np.float32)
    variance = mean(guide**2) - mean(guide) ** 2 + 25
    slope = (mean(cost * guide) - mean(guide) * mean(cost)) / variance
    expected = mean(slope) * guide + mean(mean(cost) - slope * mean(guide))
    found = consistency_of(*pair).with_radius(radius).cost(flow)
    np.testing.assert_array_equal(found, expected)


def test_flow_taken_over_is_the_cheapest_in_turn_and_the_given_flow_is_left_alone(pair):
    flow = np.random.default_rng(2).normal(0, 4, (*SIZE, 2)).astype(np.float32)
    consistency, given, expected = consistency_of(*pair), flow.copy(), flow
    least = consistency.cost(flow) - np.float32(0.2)
    for reach in (12, 6, 3):
        padded = np.pad(expected, ((reach, reach), (reach, reach), (0, 0)), "edge")
        for left, top in ((0, reach), (2 * reach, reach), (reach, 0), (reach, 2 * reach)):
            other = padded[top:, left:][: SIZE[0], : SIZE[1]]
            cost = consistency.cost(other)
            expected = np.where((cost < least)[..., None], other, expected)
            least = np.minimum(cost, least)
    np.testing.assert_array_equal(consistency.propagate(flow), expected)
    candidates = [flow, flow + 1, flow * 2]
    costs = [consistency.cost(f) + e for f, e in zip(candidates, (0, 0.5, -0.3), strict=True)]
    best = np.choose(np.argmin(costs, axis=0)[..., None], candidates)
    np.testing.assert_array_equal(consistency.choose(candidates, [0, 0.5, -0.3]), best)
    np.testing.assert_array_equal(flow, given)
