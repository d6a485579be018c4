import pytest
import torch

from omni.field.model.bijection import (
    GaborCode,
    GlobalMotion,
    PlaneMotion,
    RealNVP,
    SplineCode,
)

FRAMES = 9
TIMES = torch.tensor([0.0, 3.4, 8.0])


def stack(state, dtype, code="spline", **changes):
    """A Real-NVP stack: at its identity start, or with every weight drawn at random."""
    torch.manual_seed(3)
    made = SplineCode(FRAMES, 8, 3.0) if code == "spline" else GaborCode(FRAMES, 8)
    settings = dict(
        couplings=6,
        octaves=4,
        project_code=code == "gabor",
        hidden=24,
        layers=2,
        pre_layers=1,
        bound=0.5,
        identity_start=True,
    )
    network = RealNVP(made, 8, **(settings | changes))
    if state == "random":
        for layer in network.couplings:
            torch.nn.init.normal_(layer.output.weight, std=0.3)
            torch.nn.init.normal_(layer.output.bias, std=0.3)
    return network.to(dtype)


def points(shape, dtype):
    return (
        torch.rand(*shape, 3, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    )


@pytest.mark.parametrize("code", ["spline", "gabor"])
@pytest.mark.parametrize("state", ["identity", "random"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (3, 0)])
@torch.no_grad()
def test_inverse_undoes_forward_and_forward_undoes_inverse(shape, dtype, tolerance, state, code):
    network, x = stack(state, dtype, code), points(shape, dtype)
    embedding = network.embed(TIMES[: shape[0]].to(dtype))
    y, log_det = network(x, embedding)
    back, inverse_log_det = network.inverse(y, embedding)
    assert torch.allclose(back, x, atol=tolerance, rtol=0)
    assert torch.allclose(inverse_log_det, -log_det, atol=tolerance)
    there = network(network.inverse(x, embedding)[0], embedding)[0]
    assert torch.allclose(there, x, atol=tolerance, rtol=0)
    if state == "random" and x.shape[1] > 1:
        assert (y - x).abs().amax((0, 1)).min() > 0.05, "every axis must be moved"


def test_log_det_equals_the_autograd_jacobian():
    network = stack("random", torch.float64)
    embedding = network.embed(TIMES[1:2].double())
    for x in points((1, 5), torch.float64).unbind(1):
        jacobian = torch.autograd.functional.jacobian(
            lambda p: network(p.view(1, 1, 3), embedding)[0].view(3), x[0]
        )
        log_det = network(x[None], embedding)[1]
        assert abs(log_det).item() > 1e-3
        assert torch.allclose(jacobian.slogdet().logabsdet, log_det, atol=1e-10)


@torch.no_grad()
def test_identity_start_is_exactly_the_identity():
    network, x = stack("identity", torch.float32), points((3, 50), torch.float32)
    y, log_det = network(x, network.embed(TIMES))
    assert torch.equal(y, x) and not log_det.any()


def test_identity_start_has_gradients_in_every_coupling():
    network, x = stack("identity", torch.float32), points((3, 50), torch.float32)
    (network(x, network.embed(TIMES))[0] * x).sum().backward()
    assert all(layer.output.weight.grad.abs().max() > 0 for layer in network.couplings)


def test_log_scale_is_bounded_and_keeps_a_gradient_beyond_the_bound():
    network = stack("identity", torch.float64, couplings=1)
    bias = network.couplings[0].output.bias
    with torch.no_grad():
        bias[0] = 2.0
    log_det = network(points((1, 4), torch.float64), network.embed(TIMES[:1].double()))[1]
    log_det.sum().backward()
    assert log_det.abs().max() < 0.5 and bias.grad[0].abs() > 1e-4


@torch.no_grad()
def test_different_times_map_differently():
    network, x = stack("random", torch.float32), points((1, 20), torch.float32).expand(3, -1, -1)
    y = network(x, network.embed(TIMES))[0]
    assert (y[0] - y[1]).abs().max() > 1e-3 and (y[1] - y[2]).abs().max() > 1e-3


@torch.no_grad()
def test_spline_code_has_continuous_second_differences_in_time():
    code = SplineCode(FRAMES, 4, 3.0).double()
    second = code(torch.arange(0, 8, 1e-3, dtype=torch.float64)).diff(dim=0).diff(dim=0)
    assert second.diff(dim=0).abs().max() < 0.01 * second.abs().max()


def random_motion():
    motion = GlobalMotion(FRAMES)
    torch.manual_seed(5)
    with torch.no_grad():
        motion.matrices.add_(0.2 * torch.randn(FRAMES, 2, 3))
    return motion.double()


@torch.no_grad()
def test_global_motion_is_undone_exactly_and_leaves_depth_alone():
    motion, x = random_motion(), points((3, 50), torch.float64)
    matrix = motion.at(TIMES.double())
    moved = GlobalMotion.stabilize(x, matrix)
    assert (moved - x)[..., :2].abs().max() > 0.1 and torch.equal(moved[..., 2], x[..., 2])
    assert torch.allclose(GlobalMotion.restore(moved, matrix), x, atol=1e-12)


@torch.no_grad()
def test_global_motion_at_integer_times_is_the_table():
    motion = random_motion()
    assert torch.allclose(motion.at(torch.arange(FRAMES).double()), motion.matrices, atol=1e-14)


@torch.no_grad()
def test_global_motion_maps_by_rows_of_its_matrix():
    matrix = torch.tensor([[[2.0, 0.5, 0.1], [0.0, 3.0, -0.2]]])
    moved = GlobalMotion.stabilize(torch.tensor([[[1.0, 2.0, 7.0]]]), matrix)
    assert torch.allclose(moved, torch.tensor([[[3.1, 5.8, 7.0]]]))


def random_planes():
    planes = PlaneMotion(FRAMES, 4)
    torch.manual_seed(6)
    with torch.no_grad():
        planes.values.copy_(torch.randn(FRAMES, 4, 6))
    return planes


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_plane_motion_is_undone_exactly_and_leaves_depth_alone(dtype, tolerance):
    planes, x = random_planes(), points((3, 50), dtype)  # single precision, whatever the points
    values = planes.at(TIMES)
    moved = PlaneMotion.stabilize(x, values)
    assert (moved - x)[..., :2].abs().max() > 0.5 and torch.equal(moved[..., 2], x[..., 2])
    assert torch.allclose(PlaneMotion.restore(moved, values), x, atol=tolerance)


@torch.no_grad()
def test_every_plane_takes_over_its_own_maps_whatever_they_turn():
    angle = torch.linspace(0, 5 * torch.pi, FRAMES)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    maps = torch.zeros(3, FRAMES, 2, 3)
    maps[..., :2] = torch.stack([torch.eye(2).expand_as(turn), turn, 2 * turn])
    maps[1:, ..., 0, 1] += 0.3
    maps[..., 2] = torch.randn(3, FRAMES, 2, generator=torch.Generator().manual_seed(0))
    planes = PlaneMotion(FRAMES, 3)
    planes.start_from(maps)
    assert planes.values[..., 0].diff(dim=0).abs().max() < torch.pi
    times, x = torch.arange(FRAMES).float(), points((FRAMES, 10), torch.float32)
    for p in range(3):
        x[..., 2] = (2 * p + 1) / 3 - 1
        expected = x[..., :2] @ maps[p, :, :, :2].mT + maps[p, :, None, :, 2]
        moved = PlaneMotion.stabilize(x, planes.at(times))[..., :2]
        assert torch.allclose(moved, expected, atol=1e-5)


def test_plane_motion_has_gradients_in_every_parameter_and_in_depth():
    planes, x = PlaneMotion(FRAMES, 4), points((FRAMES, 200), torch.float32).requires_grad_()
    values = planes.at(torch.arange(FRAMES).float())
    moved = PlaneMotion.stabilize(x, values + torch.randn_like(values))
    moved[..., :2].square().sum().backward()
    assert (planes.values.grad.abs() > 0).all() and x.grad[..., 2].abs().max() > 0
