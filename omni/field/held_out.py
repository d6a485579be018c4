"""Errors of the field on held-out correspondences, and whether a fit has failed."""

import torch

from omni.field.model import Field
from omni.field.sampling import Batch
from omni.maths import denormalize, normalize

__all__ = ["LARGEST_IN_FRONT", "MEASURES", "evaluate_held_out", "has_failed"]

MEASURES = ("median", "mean", "within_1px", "within_3px", "outliers", "in_front")
"""Names of the values that `evaluate_held_out` returns, in their order."""

OUTLIER, LARGEST_OUTLIERS = 16.0, 0.1
"""Pixels at a short side of 256, and the largest share of held-out correspondences that may lie
further off: if canonical space holds an object twice, all those between the two copies do."""

LARGEST_IN_FRONT = 0.4
"""Largest share of held-out hidden points that may lie in front of their occluders. Fits of the
development clips have .02 to .17 by then, even those that start from the opposite depths."""


@torch.no_grad()
def evaluate_held_out(
    field: Field, batch: Batch, size: tuple[int, int], occlusion_margin: float
) -> dict[str, float]:
    """Errors of the field on held-out correspondences, by the names of MEASURES.

    Args:
        field: the one to evaluate.
        batch: held-out correspondences.
        size: (h, w) processing size.
        occlusion_margin: depth by which a hidden point lies behind the surface.

    Returns:
        Median and mean error in pixels, shares within 1 and 3 pixels and further off than OUTLIER,
        and the share of hidden points that the field places in front of their occluders.
    """
    target = batch.target.float()
    rays = field.cast(batch.source.float(), normalize(batch.xy, size))
    reached, _ = field.follow(rays, target)
    landed = reached[..., :2]
    distance = (denormalize(landed, size) - batch.target_xy).norm(dim=-1)[batch.visible > 0]
    hidden = (batch.hidden > 0) & (landed.abs() < 1).all(-1)
    nearest = field.seen_depth(target, landed) - occlusion_margin / 2
    ahead = (reached[..., 2] < nearest)[hidden]
    if len(distance) == 0:
        distance = torch.zeros(1)
    marks = distance < 1, distance < 3, distance > OUTLIER * min(size) / 256
    shares = [float(mark.float().mean()) for mark in marks]
    in_front = float(ahead.float().mean()) if len(ahead) else 0.0
    values = float(distance.median()), float(distance.mean()), *shares, in_front
    return dict(zip(MEASURES, values, strict=True))


def has_failed(result: dict[str, float]) -> bool:
    """Whether an early evaluation shows a duplicated object or an inverted depth order."""
    return result["outliers"] > LARGEST_OUTLIERS or result["in_front"] > LARGEST_IN_FRONT
