import pytest
import torch

from omni.field.model.canonical import CanonicalVolume, contract


def test_contraction_stays_within_two_and_changes_nothing_in_the_unit_ball():
    x = torch.randn(500, 3, dtype=torch.float64) * torch.logspace(-3, 6, 500).double()[:, None]
    y = contract(x)
    near = x.norm(dim=-1) <= 1
    assert near.any() and torch.equal(y[near], x[near])
    assert y.norm(dim=-1).max() <= 2
    assert y[~near].norm(dim=-1).min() > 1
    cosine = torch.cosine_similarity(x, y)
    assert torch.allclose(cosine, torch.ones_like(cosine))


def test_contraction_follows_its_formula_and_keeps_order_outside():
    x = torch.tensor([[2.0, 0, 0], [4.0, 0, 0]])
    assert contract(x)[:, 0].tolist() == [1.5, 1.75]


@pytest.mark.parametrize("point", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e5, 1e5, 0.0]])
def test_contraction_has_a_finite_gradient_everywhere(point):
    x = torch.tensor(point, requires_grad=True)
    contract(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_contraction_has_unit_gradient_at_the_origin():
    jacobian = torch.autograd.functional.jacobian(contract, torch.zeros(3))
    assert torch.equal(jacobian, torch.eye(3))


@pytest.mark.parametrize("kind", ["grid", "gabor"])
def test_density_is_non_negative_and_colour_in_the_unit_interval(kind):
    torch.manual_seed(0)
    volume = CanonicalVolume(kind, 16, levels=3, base=4, growth=1.7, log2_size=10)
    for parameter in volume.parameters():
        torch.nn.init.normal_(parameter)
    density, color = volume(3 * torch.randn(4, 5, 6, 3))
    assert density.shape == (4, 5, 6) and color.shape == (4, 5, 6, 3)
    assert density.min() >= 0 and color.min() >= 0 and color.max() <= 1
    assert density.std() > 0 and color.std() > 0
