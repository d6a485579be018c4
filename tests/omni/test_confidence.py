import numpy as np
import pytest

from omni.confidence import CUES, FIELD_CUES, cues, frames_away, judge
from omni.integration import LOOSE, LOST, STRICT, Chains

FRAMES = 20
SIDE = 256


def judged(level, apart=None, count=1):
    """Judgement of still points with these levels of trust, alike everywhere; queries in frame 0.

    apart: pixels between chain and field; None without a field.
    """
    level = np.broadcast_to(level, (count, FRAMES))
    chains = Chains.start(FRAMES, np.zeros(count, int), np.full((count, 2), 50, np.float32))
    known = level > LOST
    chains.level[:] = level.T
    chains.sigma[:] = np.where(known, np.where(level == STRICT, 0.4, 2.0), np.inf).T
    chains.error[:] = np.where(known, np.where(level == STRICT, 0.1, 2.0), np.inf).T
    chains.agree[:] = np.where(level == STRICT, 5, known).T
    alike = np.where(level == STRICT, 0.95, 0.3), np.where(level == STRICT, 2.0, 20.0)
    field = None
    if apart is not None:
        moved = chains.xy.transpose(1, 0, 2) + np.array([apart, 0], np.float32)
        field = moved, np.full(level.shape, 0.9, np.float32)
    values = cues(chains, np.zeros(count, int), SIDE, alike, field)
    assert values.shape == (count, FRAMES, len(CUES) + (len(FIELD_CUES) if field else 0))
    assert np.isfinite(values).all()
    return judge(values, SIDE)


def with_gap(inside):
    level = np.full(FRAMES, STRICT)
    level[8:14] = inside
    return level


def test_frames_away_counts_to_the_nearest_known_frame():
    known = np.array([[0, 0, 1, 0, 0, 0, 1, 0]], bool)
    assert frames_away(known).tolist() == [[2, 1, 0, 1, 2, 1, 0, 1]]


@pytest.mark.parametrize("apart", [None, 0.5])
@pytest.mark.parametrize("inside", [LOOSE, LOST])
def test_in_a_gap_between_strict_frames_sigma_is_larger_and_visibility_smaller(inside, apart):
    answer = judged(with_gap(inside), apart)
    sigma, visibility = answer.sigma[0], answer.visibility[0]
    assert sigma[8:14].min() > 1.5 * sigma[[7, 14]].max()
    assert visibility[8:14].max() < visibility[[7, 14]].min()
    assert answer.visible[0, 1:8].all()
    # Loose ones may be called visible on a mere chance: that is what the thresholds trade.
    if inside == LOST:
        assert not answer.visible[0, 9:13].any()


@pytest.mark.parametrize("apart", [None, 0.5])
def test_a_point_that_stays_lost_stays_uncertain(apart):
    level = np.where(np.arange(FRAMES) < 7, STRICT, LOST)
    sigma = judged(level, apart).sigma[0]
    assert sigma[7:].min() > 1.5 * sigma[:7].max() and sigma[-1] > 0.7 * sigma[7]


def test_a_field_that_contradicts_the_chain_lowers_visibility_and_raises_sigma():
    level = np.full(FRAMES, STRICT)
    agreed, contradicted = judged(level, 0.5), judged(level, 60.0)
    assert (contradicted.visibility < agreed.visibility)[0, 1:].all()
    assert (contradicted.sigma > agreed.sigma)[0, 1:].all()
