"""Cubic splines over time, by which per-frame quantities are defined at any real time.

Letters: T frames, C control points, B times.
"""

import torch
from torch import Tensor

__all__ = ["bspline_weights", "catmull_rom_weights", "num_control_points", "table_at"]


def num_control_points(num_frames: int, spacing: float) -> int:
    """Control points C of a uniform cubic B-spline covering frames `0 .. T-1`."""
    return int(-(-(num_frames - 1) // spacing)) + 3


def bspline_weights(times: Tensor, spacing: float, count: int) -> tuple[Tensor, Tensor]:
    """Indices and weights of the four control points that determine each time.

    The curve `sum_k w_k c_{i_k}` is C2 in time; weights are positive and sum to 1. Times outside
    the covered range are clamped to it.

    Args:
        times: `(B,)` frames, any real value.
        spacing: frames per control point.
        count: C.

    Returns:
        `(B, 4)` int64 indices, `(B, 4)` weights.

    Source: de Boor, A Practical Guide to Splines, uniform cubic case.
    """
    u = (times / spacing).clamp(0, count - 3)
    first = u.floor().clamp(max=count - 4)
    f = u - first
    weights = torch.stack(
        [(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], dim=-1
    )
    index = first.long()[:, None] + torch.arange(4, device=times.device)
    return index, weights / 6


def catmull_rom_weights(times: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Indices `(B, 4)` and weights `(B, 4)` of the interpolating cubic through per-frame values.

    At an integer time the result is exactly that frame's value, between frames it is C1. Times
    outside `[0, T-1]` are clamped; the sequence is extrapolated linearly beyond its ends, so that
    constant velocity stays constant up to them.
    """
    u = times.clamp(0, num_frames - 1)
    first = u.floor().clamp(max=max(num_frames - 2, 0))
    f = u - first
    weights = 0.5 * torch.stack(
        [
            -(f**3) + 2 * f**2 - f,
            3 * f**3 - 5 * f**2 + 2,
            -3 * f**3 + 4 * f**2 + f,
            f**3 - f**2,
        ],
        dim=-1,
    )
    index = first.long()[:, None] + torch.arange(-1, 3, device=times.device)
    before, start, end, after = weights.unbind(-1)
    early = torch.where(index[:, 0] < 0, before, 0)
    late = torch.where(index[:, 3] > num_frames - 1, after, 0)
    weights = torch.stack(
        [before - early, start + 2 * early - late, end + 2 * late - early, after - late], dim=-1
    )
    return index.clamp(0, num_frames - 1), weights


def table_at(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted rows `(B, ...)` of a `(C, ...)` table for `(B, 4)` indices and weights."""
    return torch.einsum("bk,bk...->b...", weights, table[index])
