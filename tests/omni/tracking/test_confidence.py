import numpy as np
import pytest

from omni.tracking.confidence import CUES, cues, frames_away, median_filtered, predict_confidence
from omni.tracking.integration import LOOSE, LOST, STRICT, Chains

FRAMES = 20
SIDE = 256


def confidence_of(level, count=1):
    """Confidence of still points with these levels, the same for all, queried in frame 0."""
    level = np.broadcast_to(level, (count, FRAMES))
    chains = Chains.start(FRAMES, np.zeros(count, int), np.full((count, 2), 50, np.float32))
    known = level > LOST
    chains.level[:] = level.T
    chains.sigma[:] = np.where(known, np.where(level == STRICT, 0.4, 2.0), np.inf).T
    chains.error[:] = np.where(known, np.where(level == STRICT, 0.1, 2.0), np.inf).T
    chains.num_fused[:] = np.where(level == STRICT, 5, known).T
    similarity = np.where(level == STRICT, 0.95, 0.3), np.where(level == STRICT, 2.0, 20.0)
    values = cues(chains, np.zeros(count, int), SIDE, similarity)
    assert values.shape == (count, FRAMES, len(CUES))
    assert np.isfinite(values).all()
    return predict_confidence(values, SIDE)


def with_gap(inside):
    level = np.full(FRAMES, STRICT)
    level[8:14] = inside
    return level


def test_frames_away_counts_to_the_nearest_known_frame():
    known = np.array([[0, 0, 1, 0, 0, 0, 1, 0]], bool)
    assert frames_away(known).tolist() == [[2, 1, 0, 1, 2, 1, 0, 1]]


@pytest.mark.parametrize("inside", [LOOSE, LOST])
def test_in_a_gap_between_strict_frames_sigma_is_larger_and_visibility_smaller(inside):
    confidence = confidence_of(with_gap(inside))
    sigma, visibility = confidence.sigma[0], confidence.visibility[0]
    assert sigma[8:14].min() > 1.5 * sigma[[7, 14]].max()
    assert visibility[8:14].max() < visibility[[7, 14]].min()
    assert confidence.visible[0, 1:8].all()
    # Loose states may be predicted visible at a low probability: the trade-off of the threshold.
    if inside == LOST:
        assert not confidence.visible[0, 9:13].any()


def test_a_point_that_stays_lost_stays_uncertain():
    level = np.where(np.arange(FRAMES) < 7, STRICT, LOST)
    sigma = confidence_of(level).sigma[0]
    assert sigma[7:].min() > 1.5 * sigma[:7].max() and sigma[-1] > 0.7 * sigma[7]


def test_one_frame_does_not_change_a_flag_but_two_do():
    trust = np.full((2, 9), 0.9)
    trust[0, 4], trust[1, 4:6] = 0.1, 0.1
    assert (median_filtered(trust) > 0.5).tolist() == [
        [True] * 9,
        [True] * 4 + [False] * 2 + [True] * 3,
    ]
