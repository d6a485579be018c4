"""The generic layers: positional encoding, Gabor network, multi-resolution grid.

`GridEncoding` is the torch reference; `grid_encoding` returns tiny-cuda-nn's kernel instead where
CUDA and the package are present. Both keep one flat parameter vector in the same layout, so a
checkpoint written with one loads into the other.
"""

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "GaborNetwork",
    "GridEncoding",
    "TcnnGridEncoding",
    "encoded_width",
    "grid_encoding",
    "positional_encoding",
]

log = logging.getLogger(__name__)


def positional_encoding(x: Tensor, octaves: int) -> Tensor:
    """Coordinates with sines and cosines at `pi 2^k`, k < octaves: `(...)` to `(..., 1+2k)`.

    Source: Mildenhall et al., NeRF, eq. 4, with the raw coordinate kept as in OmniMotion.
    """
    angles = x[..., None] * _frequencies(octaves, x.device, x.dtype)
    return torch.cat([x[..., None], angles.sin(), angles.cos()], dim=-1)


@cache
def _frequencies(octaves: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # such a tensor could not be used in training any more
        return math.pi * 2.0 ** torch.arange(octaves, device=device, dtype=dtype)


def encoded_width(octaves: int) -> int:
    """Features per coordinate of `positional_encoding`."""
    return 1 + 2 * octaves


class GaborNetwork(nn.Module):
    """Multiplicative filter network with Gabor filters: `z <- (W z + b) * g_i(x)`.

    Source: Fathony et al., Multiplicative Filter Networks, ICLR 2021, eq. 4 and 6; sizes and
    initial scales as OmniMotion uses them.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, filters: int, alpha: float):
        super().__init__()
        scale = 256 / math.sqrt(filters)
        waves = [nn.Linear(inputs, hidden) for _ in range(filters)]
        self.waves = nn.ModuleList(waves)
        self.centers = nn.ParameterList(
            nn.Parameter(2 * torch.rand(hidden, inputs) - 1) for _ in range(filters)
        )
        gamma = torch.distributions.Gamma(alpha / filters, 1.0)
        self.sharpness = nn.ParameterList(
            nn.Parameter(gamma.sample((hidden,))) for _ in range(filters)
        )
        linears = [nn.Linear(hidden, hidden) for _ in range(filters - 1)]
        self.linears = nn.ModuleList(linears)
        self.output = nn.Linear(hidden, outputs)
        with torch.no_grad():
            for wave, sharp in zip(waves, self.sharpness, strict=True):
                wave.weight.mul_(scale * sharp.sqrt()[:, None])
                wave.bias.uniform_(-math.pi, math.pi)
            for linear in linears:
                linear.weight.uniform_(-math.sqrt(1 / hidden), math.sqrt(1 / hidden))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        z = self._filter(0, x)
        for i, linear in enumerate(self.linears, start=1):
            z = linear(z) * self._filter(i, x)
        return self.output(z)

    def _filter(self, i: int, x: Tensor) -> Tensor:
        center, sharp = self.centers[i], self.sharpness[i]
        distance = (x**2).sum(-1, keepdim=True) + (center**2).sum(-1) - 2 * x @ center.T
        return torch.sin(self.waves[i](x)) * torch.exp(-0.5 * distance * sharp)


class GridEncoding(nn.Module):
    """Multi-resolution feature grid over the unit cube, trilinear, larger levels hashed.

    Layout and arithmetic are those of tiny-cuda-nn's `HashGrid` (scale `base growth^l - 1`, cell
    corner offset 0.5, levels padded to 8 entries, coherent prime hash), in float32.

    Source: Mueller et al., Instant Neural Graphics Primitives, section 3.
    """

    PRIMES = (1, 2654435761 - 2**32, 805459861)

    scales: Tensor
    resolutions: Tensor
    sizes: Tensor
    offsets: Tensor

    def __init__(self, levels: int, base: int, growth: float, log2_size: int, features: int = 2):
        super().__init__()
        scales = [base * growth**level - 1 for level in range(levels)]
        resolutions = [math.ceil(scale) + 1 for scale in scales]
        sizes = [min(-(-(r**3) // 8) * 8, 2**log2_size) for r in resolutions]
        self.width, self.features = levels * features, features
        self.params = nn.Parameter((2 * torch.rand(sum(sizes) * features) - 1) * 1e-4)

        def constant(name: str, values: list, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)

        constant("scales", scales, torch.float32)
        constant("resolutions", resolutions, torch.int32)
        constant("sizes", sizes, torch.int32)
        constant("offsets", [sum(sizes[:level]) for level in range(levels)], torch.int32)
        self.dense = sum(r**3 <= s for r, s in zip(resolutions, sizes, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Features `(N, levels * features)` of points `(N, 3)` in `[0, 1]`."""
        position = x[:, None] * self.scales[:, None] + 0.5
        cell = position.detach().floor()
        # In 64 bits only here: the gradient of rows selected by 32-bit indices takes four times
        # as long.
        index = self._index(cell.int()).long()
        table = self.params.view(-1, self.features)
        rows = table.index_select(0, index.flatten())
        rows = rows.view(*index.shape[:2], 2, 2, 2, self.features)
        share = (position - cell)[..., None]
        for axis in (2, 1, 0):
            blend = share[:, :, axis].view(*index.shape[:2], *[1] * (rows.dim() - 3))
            rows = torch.lerp(rows[:, :, 0], rows[:, :, 1], blend)
        return rows.flatten(1)

    def _index(self, cell: Tensor) -> Tensor:
        """Table rows `(N, L, 8)` of the corners of cells `(N, L, 3)`; x varies fastest."""
        ends, split = torch.stack([cell, cell + 1], dim=-1), self.dense
        x, y, z = ends[:, :split].unbind(-2)
        side, size = self.resolutions[:split, None], self.sizes[:split, None]
        # Remainders without divisions: no corner of a cell lies more than once the rows of its
        # level too far, and a hashed level has 2^k rows.
        dense = _corners(torch.add, x, side * y, side * side * z)
        dense = torch.where(dense < size, dense, dense - size)
        x, y, z = ends[:, split:].unbind(-2)
        hashed = _corners(torch.bitwise_xor, x, y * self.PRIMES[1], z * self.PRIMES[2])
        hashed = hashed & (self.sizes[split:, None] - 1)
        return torch.cat([dense, hashed], dim=1) + self.offsets[:, None]


def _corners(
    combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, z: Tensor
) -> Tensor:
    """`(..., 8)` from values `(..., 2)` at the ends of each axis of a cell; x varies fastest."""
    plane = combine(x[..., None, :], y[..., :, None])
    return combine(plane[..., None, :, :], z[..., :, None, None]).flatten(-3)


class TcnnGridEncoding(nn.Module):
    """`GridEncoding` computed by tiny-cuda-nn. Same parameters, half-precision arithmetic."""

    def __init__(self, levels: int, base: int, growth: float, log2_size: int, features: int = 2):
        super().__init__()
        import tinycudann

        self.width = levels * features
        self.encoding = tinycudann.Encoding(
            3,
            {
                "otype": "HashGrid",
                "n_levels": levels,
                "n_features_per_level": features,
                "log2_hashmap_size": log2_size,
                "base_resolution": base,
                "per_level_scale": growth,
            },
        )
        self.params = self.encoding.params

    def forward(self, x: Tensor) -> Tensor:
        """Features `(N, levels * features)` float32 of points `(N, 3)` in `[0, 1]`."""
        return self.encoding(x).float()

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The reference's state: `params` alone, without tiny-cuda-nn's own copy."""
        destination = {} if destination is None else destination
        destination[prefix + "params"] = self.params if keep_vars else self.params.detach()
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.params.copy_(state_dict[prefix + "params"])


def grid_encoding(
    levels: int, base: int, growth: float, log2_size: int, accelerated: bool
) -> GridEncoding | TcnnGridEncoding:
    """The grid encoding: tiny-cuda-nn's where `accelerated` and installed, else `GridEncoding`."""
    if accelerated and importlib.util.find_spec("tinycudann") is not None:
        log.info("canonical grid: tiny-cuda-nn")
        return TcnnGridEncoding(levels, base, growth, log2_size)
    return GridEncoding(levels, base, growth, log2_size)
