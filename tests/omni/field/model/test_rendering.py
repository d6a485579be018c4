import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni.field.model.rendering import (
    FAR,
    NEAR,
    UNIT_STEP,
    alpha,
    composite,
    distortion,
    guided_depths,
    transmittance,
    uniform_depths,
    weights,
)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(1e-4, 2))
def test_weights_are_non_negative_and_sum_to_at_most_one(density, step):
    opacity = alpha(torch.tensor(density, dtype=torch.float64), step)
    weight = weights(opacity)
    assert weight.min() >= 0 and weight.sum() <= 1 + 1e-12
    assert torch.allclose(weight.sum(), 1 - torch.prod(1 - opacity), atol=1e-12)


def test_transmittance_is_the_product_of_what_lies_in_front():
    result = transmittance(torch.tensor([0.5, 0.25, 0.0, 1.0, 0.3]))
    assert result.tolist() == pytest.approx([1, 0.5, 0.375, 0.375, 0])


def test_an_opaque_first_sample_hides_the_rest():
    weight = weights(alpha(torch.tensor([1e4, 3.0, 1e4]), 0.1))
    assert weight.tolist() == [1, 0, 0]
    assert composite(weight, torch.tensor([[5.0], [7.0], [-90.0]])).item() == pytest.approx(
        5, abs=1e-3
    )


def test_an_empty_ray_composites_to_the_plain_mean():
    values = torch.randn(4, 6, 3, dtype=torch.float64)
    assert torch.allclose(composite(torch.zeros(4, 6).double(), values), values.mean(-2))


def test_composite_does_not_change_when_all_weights_are_scaled():
    weight = torch.rand(4, 6, dtype=torch.float64) + 0.1
    values = torch.randn(4, 6, 3, dtype=torch.float64)
    exact = (weight[..., None] * values).sum(-2) / weight.sum(-1, keepdim=True)
    for factor in (1.0, 0.2, 0.02):
        assert torch.allclose(composite(factor * weight, values), exact, atol=1e-3)


def test_composite_of_a_constant_is_that_constant_whatever_the_opacity():
    weight = torch.tensor([[1e-9, 1e-8], [0.0, 0.0], [0.3, 0.1]])
    assert torch.allclose(composite(weight, torch.full((3, 2, 1), 4.0)), torch.full((3, 1), 4.0))


@pytest.mark.parametrize("samples", [2, 5, 31, 200])
def test_opacity_of_a_homogeneous_medium_does_not_depend_on_the_number_of_samples(samples):
    density, length = 0.7, 1.3
    opacity = alpha(torch.full((samples,), density, dtype=torch.float64), length / samples)
    expected = 1 - torch.exp(torch.tensor(-density * length / UNIT_STEP, dtype=torch.float64))
    assert torch.allclose(weights(opacity).sum(), expected, atol=1e-12)


def test_alpha_is_the_original_s_at_32_uniform_samples():
    assert alpha(torch.tensor(0.7), UNIT_STEP).item() == pytest.approx(1 - 2.718281828**-0.7)
    steps = uniform_depths(32, torch.zeros(1), None)[0]
    assert (steps[0], steps[-1]) == (NEAR, FAR)
    assert torch.allclose(steps.diff(), torch.full((31,), UNIT_STEP))


def test_distortion_equals_a_double_loop():
    weight = torch.rand(3, 7, dtype=torch.float64)
    depth = torch.rand(3, 7, dtype=torch.float64).sort(-1).values
    for row in range(3):
        w, z = weight[row].tolist(), depth[row].tolist()
        slow = sum(w[k] * w[m] * abs(z[k] - z[m]) for k in range(7) for m in range(7))
        slow += 0.2 / 3 * sum(v * v for v in w)
        assert distortion(weight, depth, 0.2)[row].item() == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("make", ["uniform", "guided"])
def test_jitter_keeps_samples_in_order_and_within_half_a_step(make):
    surface = torch.rand(50) + 0.5
    jitter = torch.rand(50, 6) - 0.5

    def depths(jitter):
        if make == "uniform":
            return uniform_depths(6, surface, jitter)
        return guided_depths(surface, 6, 0.15, jitter)

    plain, moved = depths(None), depths(jitter)
    step = (plain[:, 1] - plain[:, 0])[:, None]
    assert ((moved - plain).abs() <= step / 2 + 1e-6).all() and (moved != plain).any()
    assert (moved.diff(dim=-1) > 0).all()


def test_guided_depths_are_centred_on_the_surface():
    surface = torch.tensor([0.4, 1.7])
    depths = guided_depths(surface, 4, 0.15, None)
    assert torch.allclose(depths.mean(-1), surface)
    assert torch.allclose(depths[:, -1] - depths[:, 0], torch.full((2,), 0.3))
    assert torch.equal(guided_depths(surface, 1, 0.15, None)[:, 0], surface)
