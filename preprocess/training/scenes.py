"""Random scenes of textured planes, of which flow and occlusion between any two times are exact.

A surface is a plane in space with a chart `u`: the camera maps it by one 3x3 matrix,
`(x z, y z, z) = M_t (u, v, 1)`, so that layers under affine motion and tilted planes under
perspective are the same thing. What is painted at `u` is decided by its material point
`m = u + d_t(u)`, where `d_t` is a small smooth deformation: non-rigid motion costs rendering
nothing, and flow only a fixed point. Outlines and textures are functions of `m` and move with it.

Letters: B scenes, L surfaces, N points, W waves. Raster pixels; time is in frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.coords import inside, pixel_centers
from preprocess.training.textures import TextureBank

__all__ = ["Hits", "Scenes", "draw_scenes"]

WAVES = 2
STEEPEST = 0.3
"""Lipschitz bound of a deformation: far enough below 1 for its inverse to be a fixed point."""
FIXED_POINTS = 14  # 0.3^14 of a chart unit is below a millionth of a pixel
WALL, BACKDROP = 8.0, 60.0
"""Depths of the wall and of what is behind everything."""
EMPTY, EVERYWHERE = -1e3, 1e6
"""Outline levels of surfaces that cover nothing or all of their plane."""
NEAREST = 0.05  # depth from which on a point counts as in front of the camera
RIM = 1e-5  # relative depth by which an occluder must be nearer


@dataclass(frozen=True)
class Hits:
    """What rays through N points of each of B scenes meet first.

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
        basis = _rotation(self.turn * t) @ self.basis @ (eye + self.stretch * t[..., None])
        origin = self.origin + (self.velocity - self.camera_velocity[:, None]) * t
        plane = torch.cat([basis, origin[..., None]], dim=-1)
        camera = torch.zeros(len(time), 3, 3, device=time.device)
        camera[:, 0, 0] = camera[:, 1, 1] = self.focal
        camera[:, 0, 2], camera[:, 1, 2] = self.size[1] / 2, self.size[0] / 2
        camera[:, 2, 2] = 1
        view = camera @ _rotation(self.camera_turn * time[:, None]).mT
        return view[:, None] @ plane

    def cast(self, xy: Tensor, time: Tensor) -> Hits:
        """What is seen at raster points `xy` (B or 1, N, 2) at `time` (B,)."""
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
        """Exact motion of what each pixel centre sees, between two times (B,).

        Returns:
            flow (B, H, W, 2) in pixels; visible (B, H, W) bool, the point is in the target frame
            and hidden by nothing; valid (B, H, W) bool, it is in front of the camera there.
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
        """(B, H, W) int64: which surface each pixel centre sees."""
        return self.cast(self.centers, time).surface.reshape(len(time), *self.size)

    def render(self, time: Tensor, bank: TextureBank, samples: int = 4) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] at `time` (B,), before any camera noise.

        Args:
            time: (B,) middle of the exposure.
            bank: the textures that `textures` counts.
            samples: points per pixel, spread over its area and the open shutter.
        """
        image = torch.zeros(len(time), math.prod(self.size), 3, device=time.device)
        centers = self.centers
        # What stands between each pixel and the lamp, once per image: that halves the work.
        blocker = self.cast(centers + self.shadow[:, None, :2], time).inverse_depth
        for k, offset in enumerate(_spread(samples).to(time.device)):
            moment = time + self.shutter * ((k + 0.5) / samples - 0.5)
            image += self._shade(centers + offset, moment, bank, blocker)
        image = (image / samples).clamp(0, 1)
        return image.reshape(len(time), *self.size, 3).movedim(-1, 1)

    def _shade(self, xy: Tensor, time: Tensor, bank: TextureBank, blocker: Tensor) -> Tensor:
        """(B, N, 3) colours seen at points at a moment, behind a `blocker` (B, N) in shadow."""
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


def draw_scenes(
    seeds: list[tuple[int, ...]],
    size: tuple[int, int],
    bank: TextureBank,
    longest: Sequence[float],
    surfaces: int = 9,
    device: torch.device | str = "cpu",
) -> Scenes:
    """Random scenes; each depends on its own seed alone.

    Args:
        seeds: one per scene.
        size: (H, W) of the frames.
        bank: textures to choose from.
        longest: frames over which each scene will be watched: bounds its motion per frame.
        surfaces: L, at least 4: objects, a floor, a wall, a backdrop.
        device: where the scenes live.
    """
    drawn = [
        _draw(np.random.default_rng(seed), size, bank.count, surfaces, frames)
        for seed, frames in zip(seeds, longest, strict=True)
    ]
    stacked = {}
    for field in fields(Scenes)[1:]:
        values = np.stack([scene[field.name] for scene in drawn])
        kind = torch.int64 if field.name == "textures" else torch.float32
        stacked[field.name] = torch.as_tensor(values, dtype=kind, device=device)
    return Scenes(size, **stacked)


def _draw(rng, size, textures, surfaces, longest):
    """One scene as arrays. Motion is drawn in pixels per frame, then turned into world units."""
    height, width = size
    objects = surfaces - 3
    focal = width * rng.uniform(0.8, 1.8)
    flat = rng.random() < 0.35
    speed = min(_log_uniform(rng, 0.3, 24) * width / 384, 0.4 * width / longest)

    # Objects, then floor, wall, backdrop.
    depth = np.r_[rng.uniform(2, 7, objects), 4.0, WALL, BACKDROP]
    radius = np.r_[[_log_uniform(rng, 0.04, 0.4) * width for _ in range(objects)], [width / 2] * 3]
    place = rng.uniform(-0.6, 0.6, (surfaces, 2)) * (width, height)
    place[objects:] = 0
    origin = np.c_[place / focal * depth[:, None], depth]
    tilt = rng.normal(size=(surfaces, 3)) * (0, 0, 1.0) if flat else _tilts(rng, surfaces)
    tilt[objects:] *= 0.4
    tilt[-1] = 0
    basis = _rotations(tilt)[:, :, :2] * (radius / focal * depth)[:, None, None]
    has_floor = not flat and rng.random() < 0.6
    if has_floor:
        origin[objects] = (0, rng.uniform(0.7, 2.0), 4.0)
        basis[objects] = np.array([[1, 0], [0, 0], [0, 1]]) * rng.uniform(1, 3)

    own = speed * np.array([_log_uniform(rng, 0.1, 2.5) for _ in range(surfaces)])
    own = np.minimum(own, 0.5 * width / longest) * (rng.random(surfaces) < 0.8)
    own[objects:] = 0
    heading = rng.normal(size=(surfaces, 3)) * (1, 1, 0.5)
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    velocity = heading * (own / focal * depth)[:, None]
    velocity[:, 2] = velocity[:, 2].clip(-0.5 / longest, None)
    turn = rng.normal(size=(surfaces, 3)) * (own / radius * 0.4).clip(max=1.0 / longest)[:, None]
    turn[:, :2] *= not flat
    rate = (own / radius * 0.1).clip(max=0.25 / longest)
    stretch = rng.normal(size=(surfaces, 2, 2)) * rate[:, None, None]

    camera = speed * rng.choice([0.0, 0.3, 1.0], p=[0.2, 0.3, 0.5])
    camera_velocity = rng.normal(size=3) * (1, 0.6, 0.6) * camera / focal * 3
    camera_velocity[2] = np.clip(camera_velocity[2], -1 / longest, 1 / longest)
    camera_turn = rng.normal(size=3) * (0.4, 0.4, 0.4 if flat else 0.25) * camera / focal

    bending = rng.random(surfaces) < 0.5
    bending[objects] = bending[-1] = False
    wave_vector = rng.normal(size=(surfaces, WAVES, 2)) * 0.7
    steepness = rng.dirichlet([1] * (WAVES + 1), surfaces)[:, :WAVES] * STEEPEST
    length = 2 * np.pi * np.linalg.norm(wave_vector, axis=-1)
    direction = rng.normal(size=(surfaces, WAVES, 2))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    amplitude = (steepness / length.clip(0.5) * bending[:, None])[..., None] * direction
    wave_rate = rng.normal(size=(surfaces, WAVES)) * min(0.6, 0.08 * speed)

    outline = np.stack([_outline(rng) for _ in range(surfaces)])
    outline[rng.random(surfaces) < 0.15, 0] = EMPTY
    outline[objects:] = [EVERYWHERE, 1, 0, 1, 0, 0, 1]
    if not has_floor:
        outline[objects, 0] = EMPTY

    contrast = np.array([_log_uniform(rng, 0.25, 1.1) for _ in range(surfaces)])
    contrast[rng.random(surfaces) < 0.12] = 0.03
    fine = contrast * np.array([_log_uniform(rng, 0.02, 0.5) for _ in range(surfaces)])
    mix = np.eye(3) + 0.2 * rng.normal(size=(surfaces, 2, 3, 3))
    repeats = [[_log_uniform(rng, 0.15, 2), _log_uniform(rng, 0.5, 4)] for _ in range(surfaces)]
    shadow = [*rng.normal(size=2) * 0.06 * width, rng.choice([0, rng.uniform(0.15, 0.6)])]
    light_vector = rng.normal(size=2) * 4 / width
    light = [rng.choice([0, rng.uniform(0, 0.3)]), *light_vector, rng.uniform(0, 6.3)]
    return {
        "focal": focal,
        "camera_velocity": camera_velocity,
        "camera_turn": camera_turn,
        "origin": origin,
        "velocity": velocity,
        "basis": basis,
        "turn": turn,
        "stretch": stretch,
        "wave_vector": wave_vector,
        "wave_amplitude": amplitude,
        "wave_phase": rng.uniform(0, 2 * np.pi, (surfaces, WAVES)),
        "wave_rate": wave_rate,
        "outline": outline,
        "textures": rng.integers(0, textures, (surfaces, 2)),
        "repeats": repeats,
        "paint": mix * np.stack([contrast, fine], 1)[..., None, None],
        "tint": rng.uniform(0.15, 0.85, (surfaces, 1)) + 0.12 * rng.normal(size=(surfaces, 3)),
        "shutter": rng.choice([0, rng.uniform(0.2, 0.9)]),
        "shadow": shadow,
        "light": [*light, rng.normal() * 0.3],
    }


def _tilts(rng, count):
    """Rotation vectors of surfaces: up to about 60 degrees off the image plane, any roll."""
    return np.c_[rng.uniform(-1, 1, (count, 2)) * 0.75, rng.normal(size=count)]


def _rotations(vectors):
    return _rotation(torch.from_numpy(np.asarray(vectors, np.float64))).numpy()


def _outline(rng):
    """Parameters of `_covers` of one object: an irregular shape, sometimes cut into thin bars."""
    aspect = np.exp(rng.normal() * 0.5)
    ripple = rng.choice([0, rng.uniform(0.1, 0.6)])
    bars, width = (rng.uniform(0.5, 3), rng.uniform(0.04, 0.3)) if rng.random() < 0.25 else (0, 1)
    power = rng.choice([1.2, 2.0, 2.0, 4.0, 12.0])
    return np.array([1.0, aspect, ripple, power, bars, rng.uniform(0, 6.3), width])


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


def _rotation(vectors: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), by Rodrigues' formula."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vectors.shape, 3)
    turns = vectors.norm(dim=-1)[..., None, None] / math.pi  # torch's sinc has the pi inside
    eye = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    return eye + torch.sinc(turns) * cross + torch.sinc(turns / 2) ** 2 / 2 * cross @ cross


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products (..., 3) of (..., 3, 3) and (..., 3); `matmul` is slow at millions so small."""
    pairs = zip(matrices.unbind(-1), vectors.split(1, -1), strict=True)
    return sum(column * factor for column, factor in pairs)


def _spread(count: int) -> Tensor:
    """(count, 2) points evenly over a pixel around its centre, in an order that goes nowhere.

    Taken one by one while the shutter is open, points in the order of x would sharpen or blur
    what moves. Source: Roberts, The unreasonable effectiveness of quasirandom sequences (R2).
    """
    points = torch.arange(count)[:, None] * torch.tensor([0.754878, 0.569840]) % 1
    return points - points.mean(0)


def _pick(values: Tensor, surface: Tensor) -> Tensor:
    """`values` (B, L, ...) of the surfaces (B, N): (B, N, ...)."""
    batch = torch.arange(len(surface), device=surface.device)[:, None]
    return values[batch, surface]


def _log_uniform(rng, low, high):
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
