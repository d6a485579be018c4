"""The canonical volume: density and colour of every canonical point."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from omni.field.model.networks import GaborNetwork, grid_encoding

__all__ = ["CanonicalVolume", "contract"]


def contract(x: Tensor) -> Tensor:
    """Map all of space into the ball of radius 2; the identity inside the unit ball.

    `(2 - 1/|x|) x/|x|` for `|x| > 1`. The norm is clamped at 1 before dividing, so that the
    gradient at the origin stays finite.

    Args:
        x: `(..., 3)`.

    Source: Barron et al., mip-NeRF 360, eq. 10.
    """
    norm = x.square().sum(-1, keepdim=True).clamp(min=1).sqrt()
    return (2 - 1 / norm) * x / norm


class CanonicalVolume(nn.Module):
    """Density and colour as one network of the contracted canonical point.

    `kind` grid: multi-resolution grid and a small network; gabor: the original's Gabor network.
    `accelerated` lets the grid use tiny-cuda-nn where it is installed.
    Density is `softplus(raw - 1)`, colour `sigmoid(raw)`.
    """

    def __init__(
        self,
        kind: str,
        hidden: int,
        levels: int,
        base: int,
        growth: float,
        log2_size: int,
        accelerated: bool = False,
    ):
        super().__init__()
        self.kind = kind
        self.network: GaborNetwork | nn.Sequential
        if kind == "gabor":
            self.network = GaborNetwork(3, hidden, 4, filters=4, alpha=3.0)
        else:
            self.encoding = grid_encoding(levels, base, growth, log2_size, accelerated)
            self.network = nn.Sequential(
                nn.Linear(self.encoding.width, hidden), nn.ReLU(), nn.Linear(hidden, 4)
            )

    @property
    def network_dtype(self) -> torch.dtype:
        """Precision of the networks."""
        return next(self.network.parameters()).dtype

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density `(...)`, non-negative, and colour `(..., 3)` in [0, 1] of points `(..., 3)`."""
        x = contract(points)
        if self.kind == "grid":
            x = self.encoding((x.reshape(-1, 3) + 2) / 4).view(*x.shape[:-1], -1)
        raw = self.network(x)
        return softplus(raw[..., 0] - 1), torch.sigmoid(raw[..., 1:])
