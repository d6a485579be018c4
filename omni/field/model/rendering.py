"""Volume rendering as pure functions: density -> alpha -> transmittance -> weights -> composite.

One estimator for training and inference. Letters: S samples per ray, front to back on the last
axis of every argument unless stated otherwise.
"""

import torch
from torch import Tensor

__all__ = [
    "alpha",
    "composite",
    "distortion",
    "guided_depths",
    "transmittance",
    "uniform_depths",
    "weights",
]

NEAR, FAR = 0.0, 2.0
UNIT_STEP = (FAR - NEAR) / 31
"""Step length at which `alpha` equals the original's `1 - exp(-density)`: 32 samples in [0, 2]."""


def uniform_depths(samples: int, like: Tensor, jitter: Tensor | None) -> Tensor:
    """Depths `(..., S)` evenly over `[NEAR, FAR]` for rays `like` `(...)`.

    `jitter` `(..., S)` in [-0.5, 0.5] moves each sample within half a step (training); None
    gives the middle of each (inference).
    """
    steps = torch.linspace(NEAR, FAR, samples, device=like.device, dtype=like.dtype)
    steps = steps.expand(*like.shape, samples)
    return steps if jitter is None else steps + jitter * (FAR - NEAR) / (samples - 1)


def guided_depths(
    surface: Tensor, samples: int, half_width: float, jitter: Tensor | None
) -> Tensor:
    """Depths `(..., S)` evenly within `half_width` of a `surface` depth `(...)`.

    Jittered as in `uniform_depths`.
    """
    if samples == 1:
        return surface[..., None]
    steps = torch.linspace(-1, 1, samples, device=surface.device, dtype=surface.dtype)
    offset = steps if jitter is None else steps + jitter * 2 / (samples - 1)
    return surface[..., None] + half_width * offset


def alpha(density: Tensor, step: float) -> Tensor:
    """Opacity of a segment of length `step`: `1 - exp(-density step / UNIT_STEP)`.

    With the step length inside, opacity does not change with the number of samples.
    """
    return 1 - torch.exp(-density * (step / UNIT_STEP))


def transmittance(opacity: Tensor) -> Tensor:
    """Light reaching each sample: `prod_{l<k} (1 - alpha_l)`; 1 at the first."""
    through = torch.cumprod(1 - opacity, dim=-1)
    return torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)


def weights(opacity: Tensor) -> Tensor:
    """Share `w_k = T_k alpha_k` of each sample; non-negative, summing to at most 1."""
    return transmittance(opacity) * opacity


def composite(weight: Tensor, values: Tensor) -> Tensor:
    """Weighted mean `sum_k w_k v_k / sum_k w_k` over samples.

    Normalised, unlike in the original, where the composited position of a ray that is not fully
    opaque is biased towards the frame centre. An empty ray gives the plain mean.

    Args:
        weight: `(..., S)`.
        values: `(..., S, D)`.

    Returns:
        `(..., D)`.
    """
    weight = weight + 1e-6
    return (weight[..., None] * values).sum(-2) / weight.sum(-1, keepdim=True)


def distortion(weight: Tensor, depth: Tensor, step: float) -> Tensor:
    """How widely the weights scatter along each ray `(...)`.

    `sum_kl w_k w_l |z_k - z_l| + step/3 sum_k w_k^2`

    Source: Barron et al., mip-NeRF 360, eq. 15; the O(S^2) form, S is small here.
    """
    gaps = (depth[..., :, None] - depth[..., None, :]).abs()
    pairwise = (weight[..., :, None] * weight[..., None, :] * gaps).sum((-1, -2))
    return pairwise + step / 3 * weight.square().sum(-1)
