import math

import pytest
import torch

from omni.field.model.networks import GaborNetwork, GridEncoding, encoded_width, positional_encoding


def test_positional_encoding_keeps_the_coordinate_then_sines_then_cosines():
    x = torch.tensor([0.3, -0.7], dtype=torch.float64)
    encoded = positional_encoding(x, 3)
    assert encoded.shape == (2, encoded_width(3))
    for value, row in zip(x.tolist(), encoded.tolist(), strict=True):
        angles = [value * math.pi * 2**k for k in range(3)]
        expected = [value, *map(math.sin, angles), *map(math.cos, angles)]
        assert row == pytest.approx(expected, abs=1e-12)


def slow_grid(grid, levels, base, growth, log2_size, point):
    """One point's features, from the definition, in plain Python."""
    table = grid.params.view(-1, 2).tolist()
    features, offset, hashed_levels = [], 0, 0
    for level in range(levels):
        scale = base * growth**level - 1
        side = math.ceil(scale) + 1
        rows = min((side**3 + 7) // 8 * 8, 2**log2_size)
        hashed = side**3 > rows
        hashed_levels += hashed
        position = [p * scale + 0.5 for p in point]
        total = [0.0, 0.0]
        for corner in range(8):
            bits = [corner >> axis & 1 for axis in range(3)]
            cell = [math.floor(p) + b for p, b in zip(position, bits, strict=True)]
            weight = 1.0
            for p, b in zip(position, bits, strict=True):
                weight *= (p % 1) if b else 1 - (p % 1)
            if hashed:
                row = 0
                for c, prime in zip(cell, (1, 2654435761, 805459861), strict=True):
                    row ^= c * prime % 2**32
            else:
                row = cell[0] + side * (cell[1] + side * cell[2])
            for f in range(2):
                total[f] += weight * table[offset + row % rows][f]
        features += total
        offset += rows
    return features, hashed_levels


def test_grid_encoding_equals_a_slow_reference_dense_and_hashed():
    sizes = dict(levels=4, base=4, growth=1.7, log2_size=10)
    grid = GridEncoding(**sizes).double()
    torch.nn.init.normal_(grid.params)
    points = torch.rand(40, 3, dtype=torch.float64)
    points[:2] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    result = grid(points)
    assert result.shape == (40, grid.width)
    for point, row in zip(points.tolist(), result, strict=True):
        expected, hashed_levels = slow_grid(grid, **sizes, point=point)
        assert torch.allclose(row, torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    assert hashed_levels == 2, "both kinds of level must take part"


def test_grid_encoding_has_gradients_to_points_and_features():
    grid = GridEncoding(3, 4, 1.7, 10)
    torch.nn.init.normal_(grid.params)
    points = torch.rand(20, 3, requires_grad=True)
    grid(points).square().sum().backward()
    assert points.grad.abs().min() > 0 and grid.params.grad.abs().max() > 0


def test_gabor_network_is_a_product_of_gabor_filters():
    torch.manual_seed(0)
    network = GaborNetwork(2, 3, 1, filters=2, alpha=3.0).double()
    x = torch.rand(1, 2, dtype=torch.float64)

    def response(i):
        distance = (x - network.centers[i]).square().sum(-1)
        return torch.exp(-0.5 * network.sharpness[i] * distance) * network.waves[i](x).sin()

    expected = network.output(network.linears[0](response(0)) * response(1))
    assert torch.allclose(network(x), expected, atol=1e-12)
