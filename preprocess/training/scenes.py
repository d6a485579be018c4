"""Scenes of textured planes, of which flow and occlusion between any two times are exact.

A surface is a plane in space with a chart `u`: the camera maps it by one 3x3 matrix,
`(x z, y z, z) = M_t (u, v, 1)`, so that layers under affine motion and tilted planes under
perspective are the same thing. The colour at `u` is that of its material point
`m = u + d_t(u)`, where `d_t` is a small smooth deformation: non-rigid motion costs rendering
nothing, and flow only a fixed point. Outlines and textures are functions of `m` and move with it.

Letters: B scenes, L surfaces, N points, W waves. Raster pixels; time is in frames.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.maths import inside, pixel_centers
from preprocess.training.textures import TextureBank

__all__ = ["STEEPEST", "WAVES", "Hits", "Scenes", "rotations"]

WAVES = 2
"""Sine waves of the deformation of a surface."""
STEEPEST = 0.3
"""Lipschitz bound of a deformation: far enough below 1 for its inverse to be a fixed point."""
FIXED_POINTS = 14  # 0.3^14 of a chart unit is below a millionth of a pixel
NEAREST = 0.05  # depth from which on a point counts as in front of the camera
RIM = 1e-5  # relative depth by which an occluder must be nearer


@dataclass(frozen=True)
class Hits:
    """First intersections of rays through N points of each of B scenes.

    surface: (B, N) int64. material: (B, N, 2). inverse_depth: (B, N).
    footprint: (B, N) width of a pixel in chart units.
    """

    surface: Tensor
    material: Tensor
    inverse_depth: Tensor
    footprint: Tensor


@dataclass(frozen=True)
class Scenes:
    """B scenes of L surfaces, as tensors (B, L, ...) on one device; see `draw_scenes`.

    size: (H, W) of the frames. focal: (B,) pixels.
    camera_velocity, camera_turn: (B, 3) per frame; the camera is at the origin at time 0.
    origin, velocity: (B, L, 3) centre of a surface and its motion per frame.
    basis: (B, L, 3, 2) chart unit vectors at time 0. turn: (B, L, 3) rotation per frame.
    stretch: (B, L, 2, 2) linear deformation per frame.
    wave_vector, wave_amplitude: (B, L, W, 2), cycles per chart unit, chart units.
    wave_phase, wave_rate: (B, L, W) radians, radians per frame.
    outline: (B, L, 7) see `_covers`.
    textures: (B, L, 2) int64 coarse and fine texture. repeats: (B, L, 2) per chart unit.
    paint: (B, L, 2, 3, 3) colour matrix of each. tint: (B, L, 3) mean colour.
    shutter: (B,) open fraction of a frame. shadow: (B, 3) offset in pixels and strength.
    light: (B, 5) see `_illumination`.
    """

    size: tuple[int, int]
    focal: Tensor
    camera_velocity: Tensor
    camera_turn: Tensor
    origin: Tensor
    velocity: Tensor
    basis: Tensor
    turn: Tensor
    stretch: Tensor
    wave_vector: Tensor
    wave_amplitude: Tensor
    wave_phase: Tensor
    wave_rate: Tensor
    outline: Tensor
    textures: Tensor
    repeats: Tensor
    paint: Tensor
    tint: Tensor
    shutter: Tensor
    shadow: Tensor
    light: Tensor

    @property
    def centers(self) -> Tensor:
        """(1, H W, 2) raster pixel centres."""
        grid = torch.from_numpy(pixel_centers(self.size).reshape(1, -1, 2))
        return grid.to(self.focal.device)

    def matrices(self, time: Tensor) -> Tensor:
        """(B, L, 3, 3) chart to homogeneous pixels (x z, y z, z) at `time` (B,)."""
        t = time[:, None, None]
        eye = torch.eye(2, device=time.device)
        basis = rotations(self.turn * t) @ self.basis @ (eye + self.stretch * t[..., None])
        origin = self.origin + (self.velocity - self.camera_velocity[:, None]) * t
        plane = torch.cat([basis, origin[..., None]], dim=-1)
        camera = torch.zeros(len(time), 3, 3, device=time.device)
        camera[:, 0, 0] = camera[:, 1, 1] = self.focal
        camera[:, 0, 2], camera[:, 1, 2] = self.size[1] / 2, self.size[0] / 2
        camera[:, 2, 2] = 1
        view = camera @ rotations(self.camera_turn * time[:, None]).mT
        return view[:, None] @ plane

    def cast(self, xy: Tensor, time: Tensor) -> Hits:
        """First hits of the rays through raster points `xy` (B or 1, N, 2) at `time` (B,)."""
        inverse, singular = torch.linalg.inv_ex(self.matrices(time))
        ray = F.pad(xy, (0, 1), value=1.0)[:, None].mT
        u, v, w = (inverse @ ray).unbind(-2)  # w = 1 / depth
        front = (w > 0) & (w < 1 / NEAREST) & (singular == 0)[..., None]  # edge-on is not seen
        chart = torch.where(front[..., None], torch.stack([u, v], -1) / w[..., None], 0.0)
        material = chart + self._deformation(chart, time)
        covered = front & _covers(self.outline, material)
        inverse_depth, surface = torch.where(covered, w, 0.0).max(dim=1)
        picked = surface[:, None]
        material = material.gather(1, picked[..., None].expand(-1, -1, -1, 2))[:, 0]
        shrink = inverse.det().abs().gather(1, surface)
        footprint = (shrink / inverse_depth.clamp(min=1e-6) ** 3).sqrt()
        return Hits(surface, material, inverse_depth, footprint)

    def project(self, hits: Hits, time: Tensor) -> tuple[Tensor, Tensor]:
        """Where material points are at `time` (B,): raster pixels (B, N, 2) and depth (B, N)."""
        chart = hits.material
        for _ in range(FIXED_POINTS):
            chart = hits.material - self._deformation(chart, time, hits.surface)
        matrix = _pick(self.matrices(time), hits.surface)
        x, y, depth = _times(matrix, F.pad(chart, (0, 1), value=1.0)).unbind(-1)
        xy = torch.stack([x, y], -1) / depth.clamp(min=NEAREST)[..., None]
        return xy, depth

    def flow(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact motion of the point behind each pixel centre, between two times (B,).

        Returns:
            flow (B, H, W, 2) in pixels; visible (B, H, W) bool, the point is in the target frame
            and not occluded; valid (B, H, W) bool, it is in front of the camera there.
        """
        centers = self.centers
        hits = self.cast(centers, source)
        xy, depth = self.project(hits, target)
        there = self.cast(xy, target)
        nearer = there.inverse_depth * depth > 1 + RIM
        valid = (depth > NEAREST) & (hits.inverse_depth > 0)
        visible = valid & inside(xy, self.size) & ~((there.surface != hits.surface) & nearer)
        shape = (len(source), *self.size)
        flow = (xy - centers).reshape(*shape, 2)
        return flow, visible.reshape(shape), valid.reshape(shape)

    def labels(self, time: Tensor) -> Tensor:
        """(B, H, W) int64: the surface visible at each pixel centre."""
        return self.cast(self.centers, time).surface.reshape(len(time), *self.size)

    def render(self, time: Tensor, bank: TextureBank, samples: int = 4) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] at `time` (B,), before any camera noise.

        Args:
            time: (B,) middle of the exposure.
            bank: the textures that `textures` indexes.
            samples: points per pixel, distributed over its area and the open shutter.
        """
        image = torch.zeros(len(time), math.prod(self.size), 3, device=time.device)
        centers = self.centers
        # What hides the lamp from each pixel, once per image: that halves the work.
        blocker = self.cast(centers + self.shadow[:, None, :2], time).inverse_depth
        for k, offset in enumerate(_subpixel_offsets(samples).to(time.device)):
            moment = time + self.shutter * ((k + 0.5) / samples - 0.5)
            image += self._shade(centers + offset, moment, bank, blocker)
        image = (image / samples).clamp(0, 1)
        return image.reshape(len(time), *self.size, 3).movedim(-1, 1)

    def _shade(self, xy: Tensor, time: Tensor, bank: TextureBank, blocker: Tensor) -> Tensor:
        """(B, N, 3) colours at points and a moment; in shadow behind a `blocker` (B, N)."""
        hits = self.cast(xy, time)
        color = _pick(self.tint, hits.surface)
        for layer in range(2):
            repeats = _pick(self.repeats[..., layer], hits.surface)
            index = _pick(self.textures[..., layer], hits.surface)
            texture = bank.sample(
                index, hits.material * repeats[..., None], hits.footprint * repeats
            )
            paint = _pick(self.paint[:, :, layer], hits.surface)
            color = color + _times(paint, texture - 0.5)
        dark = (blocker > hits.inverse_depth * 1.03) & (hits.inverse_depth > 0)
        light = 1 - self.shadow[:, 2:] * dark
        return color.clamp(0, 1) * (light * self._illumination(xy, time))[..., None]

    def _illumination(self, xy: Tensor, time: Tensor) -> Tensor:
        """(B, N) slowly varying brightness that moves independently of every surface."""
        strength, *vector, phase, rate = self.light[:, :, None].unbind(1)
        angle = xy[..., 0] * vector[0] + xy[..., 1] * vector[1] + phase + rate * time[:, None]
        return 1 + strength * torch.sin(angle)

    def _deformation(self, chart: Tensor, time: Tensor, surface: Tensor | None = None) -> Tensor:
        """`d_t(u)` of charts (B, L, N, 2), or of (B, N, 2) on the given `surface` (B, N)."""
        angle = self.wave_phase + self.wave_rate * time[:, None, None]
        vector, amplitude = 2 * math.pi * self.wave_vector, self.wave_amplitude
        total = torch.zeros_like(chart)
        for wave in range(WAVES):
            parts = vector[:, :, wave], amplitude[:, :, wave], angle[:, :, wave, None]
            if surface is None:
                k, a, phase = (part[:, :, None] for part in parts)
            else:
                k, a, phase = (_pick(part, surface) for part in parts)
            total = total + a * torch.sin((chart * k).sum(-1, keepdim=True) + phase)
        return total


def rotations(vectors: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), by Rodrigues' formula."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vectors.shape, 3)
    turns = vectors.norm(dim=-1)[..., None, None] / math.pi  # torch's sinc has the pi inside
    eye = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    return eye + torch.sinc(turns) * cross + torch.sinc(turns / 2) ** 2 / 2 * cross @ cross


def _covers(outline: Tensor, material: Tensor) -> Tensor:
    """(B, L, N) bool: whether surfaces are there at material points (B, L, N, 2).

    `|x / a|^p + |y a|^p + r sin(5 x + phase) sin(5 y) <= level` (ellipses, rectangles, blobs), and
    within `width` of the middle of one of `bars` bars per chart unit.
    """
    level, aspect, ripple, power, bars, phase, width = outline[:, :, None].unbind(-1)
    x, y = material.unbind(-1)
    form = (x / aspect).abs().clamp(max=1e3) ** power + (y * aspect).abs().clamp(max=1e3) ** power
    form = form + ripple * torch.sin(5 * x + phase) * torch.sin(5 * y)
    along = x * bars + phase
    return (form <= level) & ((along - along.floor() - 0.5).abs() <= width / 2)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products (..., 3) of (..., 3, 3) and (..., 3); `matmul` is slow at millions so small."""
    pairs = zip(matrices.unbind(-1), vectors.split(1, -1), strict=True)
    return sum(column * factor for column, factor in pairs)


def _subpixel_offsets(count: int) -> Tensor:
    """(count, 2) points evenly over a pixel around its centre, in an order without direction.

    They are sampled one by one while the shutter is open; points in the order of x would sharpen
    or blur what moves.

    Source: Roberts, The unreasonable effectiveness of quasirandom sequences (R2).
    """
    points = torch.arange(count)[:, None] * torch.tensor([0.754878, 0.569840]) % 1
    return points - points.mean(0)


def _pick(values: Tensor, surface: Tensor) -> Tensor:
    """`values` (B, L, ...) of the surfaces (B, N): (B, N, ...)."""
    batch = torch.arange(len(surface), device=surface.device)[:, None]
    return values[batch, surface]
