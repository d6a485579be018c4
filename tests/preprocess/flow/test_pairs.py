import numpy as np
import pytest

from preprocess.flow.pairs import halfway, schedule


def test_log_schedule_holds_both_directions_of_power_of_two_gaps():
    pairs = schedule(10, "log", 5)
    expected = {(i, j) for i in range(10) for j in range(10) if abs(i - j) in (1, 2, 4)}
    assert {tuple(p) for p in pairs.tolist()} == expected
    assert len(pairs) == len(expected)


def test_log_schedule_of_a_hundred_frames_has_1074_pairs():
    assert len(schedule(100, "log", 32)) == 2 * sum(100 - gap for gap in (1, 2, 4, 8, 16, 32))


def test_exhaustive_schedule_holds_every_ordered_pair_once():
    pairs = schedule(7, "exhaustive", 1)
    assert len({tuple(p) for p in pairs.tolist()}) == len(pairs) == 7 * 6


@pytest.mark.parametrize("kind", ["log", "exhaustive"])
def test_halves_of_a_far_pair_come_before_it(kind):
    pairs = [tuple(p) for p in schedule(21, kind, 16, cuts=[9]).tolist()]
    place = {pair: k for k, pair in enumerate(pairs)}
    for (source, target), k in place.items():
        middle = halfway(source, target)
        assert place[target, source] >= 0
        if abs(target - source) == 1:
            assert middle == source
        else:
            assert max(place[source, middle], place[middle, target]) < k


def test_no_pair_crosses_a_cut():
    pairs = schedule(12, "exhaustive", 1, cuts=[3, 8])
    shot = np.array([0] * 3 + [1] * 5 + [2] * 4)
    assert (shot[pairs[:, 0]] == shot[pairs[:, 1]]).all()
    assert len(pairs) == 3 * 2 + 5 * 4 + 4 * 3


def test_gaps_longer_than_the_video_are_left_out():
    assert schedule(2, "log", 32).tolist() == [[0, 1], [1, 0]]
