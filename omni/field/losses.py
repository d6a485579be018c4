"""One pure function per loss term, and their weighted sum by name.

Residuals of correspondences are in pixels of the processing resolution; the robust form divides
them by the measured sigma, so that weights mean the same at every resolution. Letters: K pairs,
N points per pair, S samples per ray.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = [
    "acceleration",
    "adjacent_difference",
    "constancy",
    "depth_range",
    "flow_absolute",
    "flow_robust",
    "photometric",
    "pseudo_huber",
    "surface_map",
    "surface_order",
    "total",
]

DEPTH_SCALE = 20.0
"""Depth residuals are counted in twentieths of a depth unit: 0.05 is one robust sigma."""

COLOR_SCALE = 0.05
"""Colour differences count in these: about 13 grey levels, over noise and below most edges."""


def pseudo_huber(x: Tensor) -> Tensor:
    """`sqrt(1 + x^2) - 1`: quadratic near 0, linear far out, smooth (Charbonnier)."""
    return torch.sqrt(1 + x.square()) - 1


def flow_robust(residual: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """Mean pseudo-Huber of `|residual| / sigma` over weighted points.

    Args:
        residual: `(K, N, 2)` pixels, predicted minus measured target. Counted wherever the
            prediction lies, so that one outside the frame still has a gradient.
        sigma: `(K, N)` pixels.
        weight: `(K, N)`.
    """
    distance = torch.sqrt(residual.square().sum(-1) + 1e-12)
    return _mean(pseudo_huber(distance / sigma), weight)


def flow_absolute(residual: Tensor, weight: Tensor) -> Tensor:
    """Mean of `(|dx| + |dy|) / 2` pixels over all points, weights not divided out (original)."""
    return (weight * residual.abs().mean(-1)).mean()


def photometric(color: Tensor, observed: Tensor) -> Tensor:
    """Mean squared difference of rendered and observed colours `(K, N, 3)` in [0, 1]."""
    return (color - observed).square().mean()


def constancy(there: Tensor, here: Tensor, weight: Tensor) -> Tensor:
    """Photo consistency of the patches around points, which places them within a pixel.

    Mean of `r^2 / (1 + r^2)` over weighted points, r the patches' difference in units of
    COLOR_SCALE. For r of more than a few, as at occlusions, the gradient vanishes.

    Args:
        there: `(K, N, P, 3)` colours in [0, 1] around the predicted targets.
        here: `(K, N, P, 3)` around the sources.
        weight: `(K, N)`.

    Source: brightness constancy, Horn and Schunck 1981; the robust function of Geman and McClure,
    as Black and Anandan 1996 use it for flow.
    """
    square = ((there - here) / COLOR_SCALE).square().sum(-1).mean(-1)
    return _mean(square / (1 + square), weight)


def adjacent_difference(predicted: Tensor, observed: Tensor, weight: Tensor) -> Tensor:
    """L1 between differences of consecutive drawn points (the original's "gradient" terms).

    Args:
        predicted: `(K, N, D)`.
        observed: `(K, N, D)`.
        weight: `(K, N)`.
    """
    delta = (predicted[:, 1:] - predicted[:, :-1]) - (observed[:, 1:] - observed[:, :-1])
    return (weight[:, 1:, None] * delta.abs()).mean()


def acceleration(before: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Mean L1 of the second difference of 3D positions `(..., 3)` one frame apart.

    Source: OmniMotion, eq. 8.
    """
    return (before - 2 * now + after).abs().sum(-1).mean()


def depth_range(depth: Tensor, near: float, far: float) -> Tensor:
    """Mean squared overshoot of mapped depths outside [near, far]."""
    return ((near - depth).clamp(min=0) + (depth - far).clamp(min=0)).square().mean()


def surface_map(mapped: Tensor, rendered: Tensor) -> Tensor:
    """Distance of the surface map from the rendered depth `(K, N)`, whose gradient is stopped."""
    return pseudo_huber(DEPTH_SCALE * (mapped - rendered.detach())).mean()


def surface_order(
    depth: Tensor, surface: Tensor, visible: Tensor, hidden: Tensor, margin: float
) -> Tensor:
    """Depth order at the target: visible points lie on its surface, hidden ones behind it.

    Args:
        depth: `(K, N)` depth of the followed point at the target.
        surface: `(K, N)` surface map at the target: of visible points at the measured position, of
            hidden ones where the field maps them.
        visible: `(K, N)` weight of points measured visible.
        hidden: `(K, N)` weight of points measured occluded (double cycle).
        margin: depth a hidden point must at least lie behind the surface.
    """
    on = _mean(pseudo_huber(DEPTH_SCALE * (depth - surface)), visible)
    behind = (surface + margin - depth).clamp(min=0)
    return on + _mean(pseudo_huber(DEPTH_SCALE * behind), hidden)


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
    """Sum of `terms` under their weights by name."""
    weighted = sum(weights[name] * term for name, term in terms.items())
    assert isinstance(weighted, Tensor), "there is always a flow term"
    return weighted


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1)
