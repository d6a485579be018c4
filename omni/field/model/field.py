"""The quasi-3D field: bijections, canonical volume and rendering composed. No I/O, no losses.

Everything here is in normalised coordinates: x, y in [-1, 1] per axis, depth in [0, 2] along
orthographic rays. Letters: K groups sharing one time, N points per group, S samples per ray.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omni.config import ModelConfig, RenderConfig
from omni.field.model import rendering
from omni.field.model.bijection import GaborCode, GlobalMotion, PlaneMotion, RealNVP, SplineCode
from omni.field.model.canonical import CanonicalVolume

__all__ = ["Field", "Rays", "SurfaceMap"]


@dataclass
class Rays:
    """Samples along the rays of some pixels, in canonical space.

    Attributes:
        canonical: (K, N, S, 3).
        depth: (K, N, S) local depth of each sample.
        weight: (K, N, S) rendering weights.
        color: (K, N, S, 3) in [0, 1].
        step: length of one sample along the ray.
    """

    canonical: Tensor
    depth: Tensor
    weight: Tensor
    color: Tensor
    step: float

    def composite_color(self) -> Tensor:
        """(K, N, 3)."""
        return rendering.composite(self.weight, self.color)

    def composite_depth(self) -> Tensor:
        """(K, N)."""
        return rendering.composite(self.weight, self.depth[..., None])[..., 0]


class SurfaceMap(nn.Module):
    """Depth of the visible surface: one learnable map per frame.

    Rays are sampled around it, so that four samples replace the original's 32.
    """

    def __init__(self, num_frames: int, cells: int):
        super().__init__()
        self.depth = nn.Parameter(torch.ones(num_frames, cells, cells))

    def at(self, times: Tensor, xy: Tensor) -> Tensor:
        """Depth `(K, N)` at normalised `xy` `(K, N, 2)`: bilinear in space, linear in time."""
        num_frames, cells, _ = self.depth.shape
        times = times.clamp(0, num_frames - 1)
        first = times.floor().long().clamp(max=max(num_frames - 2, 0))
        later = (first + 1).clamp(max=num_frames - 1)
        blend = (times - first)[:, None]
        position = ((xy + 1) * (cells / 2) - 0.5).clamp(0, cells - 1)
        # Where a mapping has diverged the position is NaN; its index must be valid all the same.
        corner = position.detach().nan_to_num().floor().clamp(0, cells - 2)
        fx, fy = (position - corner).unbind(-1)
        column, row = corner.long().unbind(-1)
        offset = row * cells + column
        flat = self.depth.flatten()

        def gather(index: Tensor) -> Tensor:
            # Not `flat[index]`, whose gradient several threads sum in no fixed order.
            return flat.index_select(0, index.flatten()).view_as(index)

        def bilinear(frame: Tensor) -> Tensor:
            index = frame[:, None] * cells * cells + offset
            top = gather(index) * (1 - fx) + gather(index + 1) * fx
            bottom = gather(index + cells) * (1 - fx) + gather(index + cells + 1) * fx
            return top * (1 - fy) + bottom * fy

        depth = bilinear(first)
        # While training all times are frames; to look at them would be to wait for the device.
        if not self.training and bool((blend > 0).any()):
            depth = depth * (1 - blend) + bilinear(later) * blend
        return depth


class LayerMap(SurfaceMap):
    """Depth of the layer visible in each cell of each frame.

    Between two layers there is no surface, so nothing is interpolated.
    """

    def at(self, times: Tensor, xy: Tensor) -> Tensor:
        """Depth `(K, N)` in the cell and the frame nearest to normalised `xy` `(K, N, 2)`."""
        num_frames, cells, _ = self.depth.shape
        frame = times.round().long().clamp(0, num_frames - 1)[:, None]
        position = (xy.detach().nan_to_num() + 1) * (cells / 2)
        column, row = position.clamp(0, cells - 1).long().unbind(-1)
        index = (frame * cells + row) * cells + column
        return self.depth.flatten().index_select(0, index.flatten()).view_as(index)


class Field(nn.Module):
    """Bijections between every time and one canonical volume, with its density and colour.

    Args:
        num_frames: T.
        model: sizes of the networks.
        render: how rays are sampled.
        accelerated: whether CUDA kernels may be used; the field must then live on a CUDA device.
    """

    def __init__(
        self,
        num_frames: int,
        model: ModelConfig,
        render: RenderConfig,
        accelerated: bool = False,
    ):
        super().__init__()
        self.num_frames, self.render = num_frames, render
        if model.code == "gabor":
            code: GaborCode | SplineCode = GaborCode(num_frames, model.code_dim)
        else:
            code = SplineCode(num_frames, model.code_dim, model.code_spacing)
        self.bijection = RealNVP(
            code,
            model.code_dim,
            couplings=model.couplings,
            octaves=model.octaves,
            project_code=model.project_code,
            hidden=model.hidden,
            layers=model.layers,
            pre_layers=model.pre_layers,
            bound=model.scale_bound,
            identity_start=model.identity_start,
        )
        self.motion = GlobalMotion(num_frames) if model.motion == "affine" else None
        self.planes = PlaneMotion(num_frames, model.planes) if model.planes else None
        if self.motion is not None and self.planes is not None:
            self.motion.requires_grad_(False)  # whatever it misses, the planes can do
        surface_map = LayerMap if model.planes else SurfaceMap
        self.surface = surface_map(num_frames, model.surface) if model.surface else None
        self.volume = CanonicalVolume(
            model.canonical,
            model.canonical_hidden,
            model.grid_levels,
            model.grid_base,
            model.grid_growth,
            model.grid_log2_size,
            accelerated,
        )

    def stabilize(self, times: Tensor, points: Tensor) -> Tensor:
        """Local points `(K, N, 3)` (depth - 1 on the last axis) with the global motion removed."""
        if self.motion is None:
            return points
        return GlobalMotion.stabilize(points, self.motion.at(times))

    def to_canonical(self, times: Tensor, points: Tensor) -> Tensor:
        """Map `(K, N, 3)` local points (x, y, depth) at `(K,)` times into canonical space.

        In `eval` mode points are in double precision, here and in `from_canonical`.
        """
        local = self.stabilize(times, _centered(self._promoted(points)))
        if self.planes is not None:
            local = PlaneMotion.stabilize(local, self.planes.at(times))
        return self.bijection(local, self.bijection.embed(times))[0]

    def from_canonical(self, times: Tensor, points: Tensor, stabilized: bool = False) -> Tensor:
        """Map `(K, N, 3)` canonical points to local (x, y, depth) at `(K,)` times.

        The exact inverse of `to_canonical`. With `stabilized`, x and y stay in the stabilised
        plane, where a static scene does not move.
        """
        local = self.bijection.inverse(self._promoted(points), self.bijection.embed(times))[0]
        if self.planes is not None:
            local = PlaneMotion.restore(local, self.planes.at(times))
        if self.motion is not None and not stabilized:
            local = GlobalMotion.restore(local, self.motion.at(times))
        return _uncentered(local)

    def cast(self, times: Tensor, xy: Tensor, jitter: Tensor | None = None) -> Rays:
        """Sample the rays of pixels.

        Args:
            times: `(K,)` frames, any real value.
            xy: `(K, N, 2)` normalised.
            jitter: `(K, N, S)` in [-0.5, 0.5] while training, else None.

        Returns:
            Rays with `(K, N, S)` samples.
        """
        samples, xy = self.render.samples, xy.to(self.volume.network_dtype)
        if self.surface is None:
            depth = rendering.uniform_depths(samples, xy[..., 0], jitter)
            step = rendering.UNIT_STEP * 31 / max(samples - 1, 1)
        else:
            # The map is fitted by its own loss. Through the sample positions the flow loss would
            # move it along the ray, a direction that flow does not constrain.
            surface = self.surface.at(times, xy).detach()
            half = self.render.half_width
            depth = rendering.guided_depths(surface, samples, half, jitter)
            step = 2 * half / max(samples - 1, 1)
        points = torch.cat([xy[..., None, :].expand(*depth.shape, 2), depth[..., None]], dim=-1)
        canonical = self.to_canonical(times, points.flatten(1, 2)).view(points.shape)
        density, color = self.volume(canonical.to(depth.dtype))
        weight = rendering.weights(rendering.alpha(density, step))
        return Rays(canonical, depth, weight, color, step)

    def follow(self, rays: Rays, times: Tensor) -> tuple[Tensor, Tensor]:
        """Positions at other times of the surface visible along rays.

        Samples that leave the depth range do not count.

        Args:
            rays: K groups.
            times: `(K,)` target times.

        Returns:
            `(K, N, 3)` composited x, y, depth and `(K, N, S, 3)` all mapped samples.
        """
        flat = rays.canonical.flatten(1, 2)
        mapped = self.from_canonical(times, flat).view(rays.canonical.shape)
        depth = mapped[..., 2].detach()
        in_range = (depth > rendering.NEAR) & (depth < rendering.FAR)
        return rendering.composite(rays.weight * in_range, mapped), mapped

    def _promoted(self, points: Tensor) -> Tensor:
        return points if self.training else points.double()

    def seen_depth(self, times: Tensor, xy: Tensor) -> Tensor:
        """Depth `(K, N)` of the surface visible at normalised `xy` `(K, N, 2)`."""
        return self.cast(times, xy).composite_depth()


def _centered(points: Tensor) -> Tensor:
    return torch.cat([points[..., :2], points[..., 2:] - 1], dim=-1)


def _uncentered(points: Tensor) -> Tensor:
    return torch.cat([points[..., :2], points[..., 2:] + 1], dim=-1)
