import numpy as np

from omni.maths.quantisation import Evidence, pack_evidence
from omni.store import UNKNOWN
from preprocess.evidence.consistency import (
    assess,
    cycle_errors,
    gap_statistics,
    labels_agree,
)
from preprocess.flow import compose

SIZE = 24, 32


def constant(dx, dy=0):
    return np.broadcast_to(np.float32([dx, dy]), (*SIZE, 2)).copy()


def test_exact_reverse_has_no_error_and_wrong_reverse_shows_in_full():
    assert cycle_errors(constant(3, -2), constant(-3, 2))[0].max() < 1e-6
    np.testing.assert_allclose(cycle_errors(constant(3, 0), constant(0, 4))[0], 5, atol=1e-5)


def test_targets_outside_the_frame_are_invalid():
    valid = assess(constant(10), constant(-10), 1.5).valid
    columns = np.flatnonzero(valid.all(axis=0))
    assert columns.tolist() == list(range(22)), "31.5 lies in a frame 32 wide, 32.5 does not"
    assert not valid[:, 22:].any()


def occluder():
    """Background at rest, a block of columns 8..15 moves right by 8: it hides columns 16..23."""
    forward, backward = constant(0), constant(0)
    forward[:, 8:16] = 8, 0
    backward[:, 16:24] = -8, 0
    return forward, backward


def test_double_cycle_finds_exactly_the_points_behind_an_occluder():
    evidence = assess(*occluder(), threshold=1.5)
    expected = np.zeros(SIZE, bool)
    expected[:, 16:24] = True
    np.testing.assert_array_equal(evidence.occluded, expected)
    np.testing.assert_array_equal(evidence.error > 1.5, expected)
    assert evidence.valid.all()


def test_random_flow_is_not_marked_as_occluded():
    forward, backward = constant(0), constant(9, 3)
    backward[:, ::2] *= -1
    forward[:, ::3] = 0, 7
    second = cycle_errors(forward, backward)[1]
    evidence = assess(forward, backward, 1.5)
    assert not evidence.occluded[second >= 1.5].any()
    assert (evidence.error > 1.5).mean() > 0.9


def test_labels_agree_where_the_landing_label_is_the_same_or_unknown():
    source = np.zeros(SIZE, np.uint8)
    source[:, 4:8] = 1
    target = np.zeros(SIZE, np.uint8)
    target[:, 6:10] = 1
    target[10] = UNKNOWN
    agree = labels_agree(constant(2), source, target)
    assert agree.all()
    disagree = ~labels_agree(constant(0), source, target)
    assert disagree[0].tolist() == [c in (4, 5, 8, 9) for c in range(32)]
    assert not disagree[10].any()
    valid = assess(constant(0), constant(0), 1.5, (source, target)).valid
    np.testing.assert_array_equal(valid, ~disagree)


def test_statistics_per_gap_count_pixels():
    error = np.array([0, 0, 1, 8.0])
    items = [
        Evidence(error, np.array([0, 0, 0, 1], bool), np.array([1, 1, 1, 1], bool)),
        Evidence(error + 4, np.zeros(4, bool), np.array([1, 1, 0, 0], bool)),
    ]
    packed = np.stack([pack_evidence(item)[None] for item in items])
    near, far = gap_statistics(packed, np.array([[0, 1], [2, 0]]), 1.5)
    assert (near["gap"], near["reliable"], near["occluded"]) == (1, 0.75, 0.25)
    assert near["median_error"] == 0
    assert (far["gap"], far["reliable"]) == (2, 0)
    assert abs(far["median_error"] - 4) < 0.2


def test_errors_are_the_norms_of_both_cycles_to_the_bit():
    forward, backward = np.random.default_rng(0).normal(0, 3, (2, *SIZE, 2)).astype(np.float32)
    back = compose(forward, backward)
    first = np.linalg.norm(back, axis=-1)
    second = np.linalg.norm(compose(back, forward) - forward, axis=-1)
    evidence = assess(forward, backward, 1.5)
    np.testing.assert_array_equal(evidence.error, first)
    np.testing.assert_array_equal(cycle_errors(forward, backward)[1], second)
    expected = (first > 2.25) & (second < 1.5) & evidence.valid
    np.testing.assert_array_equal(evidence.occluded, expected)
