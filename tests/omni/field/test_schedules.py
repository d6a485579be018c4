import numpy as np
import pytest

from omni.config import OptimConfig, Term, load_config
from omni.field.schedules import gap_limit, learning_rate, ramp


@pytest.mark.parametrize("step", [0, 1, 4999, 20000, 49999, 50000, 50001, 100000])
def test_paper_photometric_ramp_is_a_five_thousandth_of_the_step_up_to_ten(step):
    term = load_config("paper").loss.photometric
    assert term == Term(10, 0, 0.5)
    assert ramp(term, step / 100000) == pytest.approx(np.clip(step / 5000, 0, 10))


def test_paper_distortion_ramp_starts_at_40k_and_ends_at_60k():
    term = load_config("paper").loss.distortion
    values = [ramp(term, step / 100000) for step in (0, 40000, 50000, 60000, 100000)]
    assert values == pytest.approx([0, 0, 5, 10, 10])


def test_a_term_without_a_ramp_is_constant_from_the_first_step():
    assert ramp(Term(0.7), 0) == ramp(Term(0.7), 1) == 0.7


def test_step_decay_halves_every_fifth_of_the_run():
    optim = OptimConfig(steps=100, decay="step", warmup=0)
    steps = [0, 19, 20, 40, 60, 80, 99]
    assert [learning_rate(optim, s) for s in steps] == [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625]


def test_cosine_falls_from_one_to_two_percent_after_a_linear_warm_up():
    plain, warm = OptimConfig(steps=1000, warmup=0), OptimConfig(steps=1000, warmup=50)
    values = [learning_rate(plain, s) for s in range(1001)]
    assert (
        values[0] == 1 and values[500] == pytest.approx(0.51) and values[-1] == pytest.approx(0.02)
    )
    assert np.diff(values).max() < 0
    assert learning_rate(warm, 0) == pytest.approx(1 / 50)
    assert learning_rate(warm, 24) == pytest.approx(values[24] / 2)
    assert learning_rate(warm, 49) == values[49]


def test_gap_limit_grows_linearly_between_its_ends():
    assert [gap_limit(20, 70, f) for f in (0, 0.5, 1, 1.2)] == [20, 45, 70, 70]
    assert gap_limit(32, 32, 0.3) == 32
