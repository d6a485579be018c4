"""Every loss term of one batch: the field compared with what was measured.

Letters: K pairs, N points per pair, S samples per ray.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.config import Config
from omni.field import losses
from omni.field.model import FAR, NEAR, Field, Rays, composite, distortion
from omni.field.sampling import Batch, CorrespondenceSampler
from omni.maths import denormalize, normalize

__all__ = ["Objective"]


@dataclass(frozen=True)
class Objective:
    """Computes the terms that have a weight in the settings.

    Attributes:
        config: every setting; `loss` and `render` matter here.
        sampler: where the batches come from; samples the frames.
        size: (h, w) processing size.
        num_frames: T.
    """

    config: Config
    sampler: CorrespondenceSampler
    size: tuple[int, int]
    num_frames: int

    def terms(
        self, field: Field, batch: Batch, jitter: Tensor, longest: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Unweighted loss terms by their names in `LossConfig`, and residuals for hard mining.

        Args:
            field: in training mode.
            batch: K pairs of N correspondences.
            jitter: `(K, N, S)` in [-0.5, 0.5], fractions of a step along the rays.
            longest: longest gap of the flows drawn at this step, frames.

        Returns:
            scalars by name, and `(K, N)` distances from the measured targets in sigma.
        """
        config = self.config.loss
        source, target = batch.source.float(), batch.target.float()
        xy = normalize(batch.xy, self.size)
        rays = field.cast(source, xy, jitter)
        reached, mapped = field.follow(rays, target)
        # Denormalised anew for every term that needs it: one shared tensor would sum the gradients
        # before scaling them, which rounds differently.
        difference = denormalize(reached[..., :2], self.size) - batch.target_xy
        weight = batch.visible + batch.hidden
        color = rays.composite_color()
        terms = {
            "flow": losses.flow_robust(difference, batch.sigma, batch.visible)
            if config.robust
            else losses.flow_absolute(difference, weight * _pair_weight(batch, longest)),
            "photometric": losses.photometric(color, batch.color),
            "depth_range": losses.depth_range(mapped[..., 2], NEAR, FAR),
        }
        if field.surface is not None and config.surface.weight:
            terms["surface"] = self._surface(field, batch, rays, reached)
        if config.constancy.weight:
            here = self.sampler.patches(batch.source, batch.xy)
            there = self.sampler.patches(batch.target, denormalize(reached[..., :2], self.size))
            terms["constancy"] = losses.constancy(there, here, batch.visible)
        if config.acceleration.weight and self.num_frames > 2:
            terms["acceleration"] = self._acceleration(field, rays, source)
        if config.distortion.weight:
            terms["distortion"] = distortion(rays.weight, rays.depth, rays.step).mean()
        if config.photometric_difference.weight:
            terms["photometric_difference"] = losses.adjacent_difference(
                color, batch.color, torch.ones_like(weight)
            )
        if config.flow_difference.weight:
            terms["flow_difference"] = losses.adjacent_difference(
                denormalize(reached[..., :2], self.size), batch.target_xy, weight
            )
        return terms, difference.detach().norm(dim=-1) / batch.sigma

    def _surface(self, field: Field, batch: Batch, rays: Rays, reached: Tensor) -> Tensor:
        """Losses of the surface map at the source and of the depth order at the target."""
        assert field.surface is not None
        own = field.surface.at(batch.source.float(), normalize(batch.xy, self.size))
        # Flow measured to a hidden point is that of its occluder, so the occluding surface is read
        # where the field maps the point.
        landed = reached.detach()[..., :2]
        hidden = batch.hidden * (landed.abs() < 1).all(-1)
        measured = normalize(batch.target_xy, self.size)
        place = torch.where(hidden[..., None] > 0, landed, measured)
        there = field.surface.at(batch.target.float(), place)
        margin = self.config.render.occlusion_margin
        return losses.surface_map(own, rays.composite_depth()) + losses.surface_order(
            reached[..., 2], there, batch.visible, hidden, margin
        )

    def _acceleration(self, field: Field, rays: Rays, times: Tensor) -> Tensor:
        """Of a quarter of the points, in the stabilised plane: camera shake is not penalised."""
        count = max(1, rays.weight.shape[1] // 4)
        points = composite(rays.weight[:, :count], rays.canonical[:, :count])
        middle = times.clamp(1, self.num_frames - 2)
        stacked = torch.cat([middle - 1, middle, middle + 1])
        path = field.from_canonical(stacked, points.repeat(3, 1, 1), stabilized=True)
        return losses.acceleration(*path.chunk(3))


def _pair_weight(batch: Batch, longest: int) -> Tensor:
    """The original's cosine weight `(K, 1)` of a pair, falling to 0 at the longest trained gap."""
    gap = (batch.target - batch.source).abs().float()
    return torch.cos((gap - 1) / longest * (torch.pi / 2)).clamp(min=0)[:, None]
