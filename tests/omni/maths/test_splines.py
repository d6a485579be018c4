import pytest
import torch

from omni.maths.splines import bspline_weights, catmull_rom_weights, num_control_points, table_at


def curve(weights, table):
    return lambda times: table_at(table, *weights(times))


def second_difference_jump(function, end):
    """Largest change of the second difference between neighbours, relative to the largest one."""
    step = 1e-3
    value = function(torch.arange(0, end, step, dtype=torch.float64))
    second = value.diff(dim=0).diff(dim=0)
    return float(second.diff(dim=0).abs().max() / second.abs().max())


@pytest.mark.parametrize(
    "num_frames, spacing", [(2, 3.0), (7, 3.0), (10, 3.0), (11, 1.0), (6, 2.5)]
)
def test_bspline_reproduces_a_line_over_every_frame(num_frames, spacing):
    count = num_control_points(num_frames, spacing)
    times = torch.linspace(0, num_frames - 1, 41, dtype=torch.float64)
    index, weights = bspline_weights(times, spacing, count)
    assert 0 <= index.min() and index.max() < count
    assert (weights >= 0).all() and torch.allclose(weights.sum(1), torch.ones(41).double())
    line = table_at(torch.arange(count, dtype=torch.float64), index, weights)
    assert torch.allclose(line, times / spacing + 1)


def test_bspline_has_continuous_second_derivative_and_catmull_rom_has_not():
    table = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smooth = curve(lambda t: bspline_weights(t, 3.0, 9), table)
    less = curve(lambda t: catmull_rom_weights(t, 9), table)
    assert second_difference_jump(smooth, 18.0) < 0.01
    assert second_difference_jump(less, 8.0) > 0.1


def test_catmull_rom_meets_every_frame_exactly_and_is_c1():
    table = torch.randn(6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = curve(lambda t: catmull_rom_weights(t, 6), table)
    assert torch.equal(at(torch.arange(6).double()), table)
    slope = at(torch.arange(0, 5, 1e-4, dtype=torch.float64)).diff(dim=0)
    assert slope.diff(dim=0).abs().max() < 0.01 * slope.abs().max()


@pytest.mark.parametrize("num_frames", [2, 3, 7])
def test_catmull_rom_reproduces_a_line_up_to_the_ends(num_frames):
    times = torch.linspace(0, num_frames - 1, 43, dtype=torch.float64)
    index, weights = catmull_rom_weights(times, num_frames)
    line = table_at(torch.arange(num_frames, dtype=torch.float64), index, weights)
    assert torch.allclose(line, times)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_catmull_rom_clamps_times_outside_the_video(num_frames):
    table = torch.randn(num_frames, 2)
    at = curve(lambda t: catmull_rom_weights(t, num_frames), table)
    assert torch.allclose(at(torch.tensor([-3.0, num_frames + 4.0])), table[[0, -1]])
