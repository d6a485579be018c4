import pytest
import torch

from omni.config import LossConfig, ModelConfig, RenderConfig, Term
from omni.field import losses
from omni.field.model.field import Field
from omni.field.update import term_weights
from omni.maths.coords import denormalize


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_out():
    x = torch.tensor([1e-3, 1e4], dtype=torch.float64, requires_grad=True)
    value = losses.pseudo_huber(x)
    value.sum().backward()
    assert value.tolist() == pytest.approx([5e-7, 9999.00005], rel=1e-6)
    assert x.grad.tolist() == pytest.approx([1e-3, 1], rel=1e-6)


def test_robust_flow_counts_in_sigmas_and_only_weighted_points():
    residual = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [900.0, 0.0]]])
    sigma = torch.tensor([[2.5, 1.0, 1.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0]])
    expected = (5**0.5 - 1) / 2
    assert losses.flow_robust(residual, sigma, weight).item() == pytest.approx(expected, rel=1e-5)
    assert losses.flow_robust(10 * residual, 10 * sigma, weight).item() == pytest.approx(expected)


def test_losses_without_any_weighted_point_are_zero_with_a_finite_gradient():
    residual = torch.zeros(2, 3, 2, requires_grad=True)
    nothing, sigma = torch.zeros(2, 3), torch.ones(2, 3)
    loss = losses.flow_robust(residual, sigma, nothing) + losses.flow_absolute(residual, nothing)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(residual.grad).all()


def test_absolute_flow_is_the_mean_over_all_points():
    residual = torch.tensor([[[3.0, -1.0], [8.0, 8.0]]])
    assert losses.flow_absolute(residual, torch.tensor([[1.0, 0.5]])).item() == 3.0


@pytest.mark.parametrize("robust", [True, False])
def test_a_prediction_far_outside_the_frame_still_has_a_gradient(robust):
    model = ModelConfig(couplings=3, hidden=8, code_dim=4, grid_levels=2, surface=8)
    field = Field(4, model, RenderConfig())
    with torch.no_grad():
        field.motion.matrices[0, 0, 2] = 6.0
    xy = torch.rand(1, 20, 2) - 0.5
    reached, _ = field.follow(field.cast(torch.zeros(1), xy), torch.ones(1))
    assert reached[..., 0].min() > 1
    residual, ones = denormalize(reached[..., :2] - xy, (24, 32)), torch.ones(1, 20)
    loss = (
        losses.flow_robust(residual, ones, ones) if robust else losses.flow_absolute(residual, ones)
    )
    loss.backward()
    assert field.motion.matrices.grad[0, 0, 2] > 0.1


def test_adjacent_difference_ignores_a_common_offset():
    observed = torch.randn(2, 5, 3)
    weight = torch.ones(2, 5)
    assert losses.adjacent_difference(observed + 4, observed, weight).item() == pytest.approx(
        0, abs=1e-6
    )
    spoiled = observed.clone()
    spoiled[:, 2:] += 1
    assert losses.adjacent_difference(spoiled, observed, weight).item() == pytest.approx(0.25)


def test_constancy_pulls_small_differences_and_lets_large_ones_go():
    here = torch.full((1, 4, 9, 3), 0.5)
    off = torch.tensor([0.0, 0.02, 0.4, 0.02]).view(1, 4, 1, 1).requires_grad_()
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss = losses.constancy(here + off, here, weight)
    loss.backward()
    small, large = 3 * 0.4**2, 3 * 8**2
    expected = (small / (1 + small) + large / (1 + large)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    same, pulled, let_go, unweighted = off.grad.flatten().tolist()
    assert same == 0 and unweighted == 0 and pulled > 50 * let_go > 0


def test_acceleration_vanishes_for_constant_velocity():
    now, velocity = torch.randn(3, 4, 3), torch.randn(3, 4, 3)
    constant = losses.acceleration(now - velocity, now, now + velocity)
    assert constant.item() == pytest.approx(0, abs=1e-6)
    assert losses.acceleration(now, now, now + torch.tensor([1.0, 2, 3])).item() == pytest.approx(6)


def test_depth_range_counts_only_the_overshoot():
    depth = torch.tensor([0.0, 1.0, 2.0, -0.5, 2.25])
    expected = (0.25 + 0.0625) / 5
    assert losses.depth_range(depth, 0, 2).item() == pytest.approx(expected)


def test_the_surface_map_moves_towards_rendered_depth_and_not_the_reverse():
    mapped = torch.tensor([[1.2]], requires_grad=True)
    rendered = torch.tensor([[1.0]], requires_grad=True)
    losses.surface_map(mapped, rendered).backward()
    assert mapped.grad.item() > 0 and rendered.grad is None


@pytest.mark.parametrize(
    "depth, visible, hidden, zero",
    [
        (1.0, 1, 0, True),
        (1.3, 1, 0, False),
        (0.7, 1, 0, False),
        (1.3, 0, 1, True),
        (1.05, 0, 1, False),
        (0.7, 0, 1, False),
        (0.7, 0, 0, True),
    ],
)
def test_visible_points_lie_on_the_surface_and_hidden_ones_behind_it(depth, visible, hidden, zero):
    def one(value):
        return torch.tensor([[float(value)]])

    loss = losses.surface_order(one(depth), one(1), one(visible), one(hidden), margin=0.1)
    assert (loss.item() < 1e-9) == zero


def test_total_weighs_every_term_by_its_ramp():
    config = LossConfig(flow=Term(2.0), photometric=Term(10.0, 0.0, 0.5), acceleration=Term(0.0))
    terms = {name: torch.tensor(1.0) for name in ("flow", "photometric", "acceleration")}
    for fraction, total in ((0.25, 7.0), (1.0, 12.0)):
        assert losses.total(terms, term_weights(config, fraction)).item() == total
