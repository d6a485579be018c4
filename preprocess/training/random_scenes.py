"""Random scenes for training: layout, motion, deformation, outlines, paint and lighting.

The order of the draws decides every training set: whatever is added is drawn last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from preprocess.training.scenes import STEEPEST, WAVES, Scenes, rotations
from preprocess.training.textures import TextureBank

__all__ = ["draw_scenes"]

WALL, BACKDROP = 8.0, 60.0
"""Depths of the wall and of what is behind everything."""
EMPTY, EVERYWHERE = -1e3, 1e6
"""Outline levels of surfaces that cover nothing or all of their plane."""

Arrays = dict[str, Any]
"""Fields of `Scenes` of one scene, by name: arrays without the scene's axis, or numbers."""


@dataclass(frozen=True)
class _View:
    """What all parts of a scene depend on.

    size: (H, W) of the frames. surfaces: L. focal: pixels.
    longest: frames over which the scene will be watched.
    flat: whether all surfaces are parallel to the image, and motion is affine.
    speed: typical motion, pixels per frame.
    """

    size: tuple[int, int]
    surfaces: int
    longest: float
    focal: float
    flat: bool
    speed: float

    @property
    def objects(self) -> int:
        """Number of surfaces before floor, wall and backdrop, which stand in this order."""
        return self.surfaces - 3


@dataclass(frozen=True)
class _Layout:
    """Where the surfaces are at time 0.

    origin: (L, 3) centres. basis: (L, 3, 2) chart unit vectors.
    depth: (L,). radius: (L,) pixels of a chart unit. has_floor: whether the floor is there.
    """

    origin: np.ndarray
    basis: np.ndarray
    depth: np.ndarray
    radius: np.ndarray
    has_floor: bool


def draw_scenes(
    seeds: Sequence[tuple[int, ...]],
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


def _draw(
    rng: np.random.Generator,
    size: tuple[int, int],
    textures: int,
    surfaces: int,
    longest: float,
) -> Arrays:
    """One scene. Motion is drawn in pixels per frame, then turned into world units."""
    view = _draw_view(rng, size, surfaces, longest)
    layout = _draw_layout(rng, view)
    scene: Arrays = {"focal": view.focal, "origin": layout.origin, "basis": layout.basis}
    scene |= _draw_motion(rng, view, layout)
    scene |= _draw_camera_motion(rng, view)
    scene |= _draw_deformation(rng, view)
    scene["outline"] = _draw_outlines(rng, view, layout.has_floor)
    scene |= _draw_paint(rng, view)
    scene |= _draw_lighting(rng, view)
    scene["wave_phase"] = rng.uniform(0, 2 * np.pi, (surfaces, WAVES))
    scene["textures"] = rng.integers(0, textures, (surfaces, 2))
    tone = rng.uniform(0.15, 0.85, (surfaces, 1))
    scene["tint"] = tone + 0.12 * rng.normal(size=(surfaces, 3))
    scene["shutter"] = rng.choice([0, rng.uniform(0.2, 0.9)])
    scene["light"] = [*scene["light"], rng.normal() * 0.3]
    return scene


def _draw_view(
    rng: np.random.Generator, size: tuple[int, int], surfaces: int, longest: float
) -> _View:
    width = size[1]
    focal = width * rng.uniform(0.8, 1.8)
    flat = rng.random() < 0.35
    speed = min(_log_uniform(rng, 0.3, 24) * width / 384, 0.4 * width / longest)
    return _View(size, surfaces, longest, focal, flat, speed)


def _draw_layout(rng: np.random.Generator, view: _View) -> _Layout:
    (height, width), focal = view.size, view.focal
    surfaces, objects = view.surfaces, view.objects
    depth = np.r_[rng.uniform(2, 7, objects), 4.0, WALL, BACKDROP]
    radius = np.r_[[_log_uniform(rng, 0.04, 0.4) * width for _ in range(objects)], [width / 2] * 3]
    place = rng.uniform(-0.6, 0.6, (surfaces, 2)) * (width, height)
    place[objects:] = 0
    origin = np.c_[place / focal * depth[:, None], depth]
    tilt = rng.normal(size=(surfaces, 3)) * (0, 0, 1.0) if view.flat else _tilts(rng, surfaces)
    tilt[objects:] *= 0.4
    tilt[-1] = 0
    spin = rotations(torch.from_numpy(tilt)).numpy()
    basis = spin[:, :, :2] * (radius / focal * depth)[:, None, None]
    has_floor = not view.flat and rng.random() < 0.6
    if has_floor:
        origin[objects] = (0, rng.uniform(0.7, 2.0), 4.0)
        basis[objects] = np.array([[1, 0], [0, 0], [0, 1]]) * rng.uniform(1, 3)
    return _Layout(origin, basis, depth, radius, has_floor)


def _tilts(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rotation vectors of surfaces: up to about 60 degrees off the image plane, any roll."""
    return np.c_[rng.uniform(-1, 1, (count, 2)) * 0.75, rng.normal(size=count)]


def _draw_motion(rng: np.random.Generator, view: _View, layout: _Layout) -> Arrays:
    """Rigid and affine motion of the objects; floor, wall and backdrop stand still."""
    surfaces, objects, longest = view.surfaces, view.objects, view.longest
    width, radius = view.size[1], layout.radius
    own = view.speed * np.array([_log_uniform(rng, 0.1, 2.5) for _ in range(surfaces)])
    own = np.minimum(own, 0.5 * width / longest) * (rng.random(surfaces) < 0.8)
    own[objects:] = 0
    heading = rng.normal(size=(surfaces, 3)) * (1, 1, 0.5)
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    velocity = heading * (own / view.focal * layout.depth)[:, None]
    velocity[:, 2] = velocity[:, 2].clip(-0.5 / longest, None)
    turn = rng.normal(size=(surfaces, 3)) * (own / radius * 0.4).clip(max=1.0 / longest)[:, None]
    turn[:, :2] *= not view.flat
    rate = (own / radius * 0.1).clip(max=0.25 / longest)
    stretch = rng.normal(size=(surfaces, 2, 2)) * rate[:, None, None]
    return {"velocity": velocity, "turn": turn, "stretch": stretch}


def _draw_camera_motion(rng: np.random.Generator, view: _View) -> Arrays:
    focal, longest = view.focal, view.longest
    speed = view.speed * rng.choice([0.0, 0.3, 1.0], p=[0.2, 0.3, 0.5])
    velocity = rng.normal(size=3) * (1, 0.6, 0.6) * speed / focal * 3
    velocity[2] = np.clip(velocity[2], -1 / longest, 1 / longest)
    turn = rng.normal(size=3) * (0.4, 0.4, 0.4 if view.flat else 0.25) * speed / focal
    return {"camera_velocity": velocity, "camera_turn": turn}


def _draw_deformation(rng: np.random.Generator, view: _View) -> Arrays:
    """Waves of every other surface; never of the floor and the backdrop. Phases come later."""
    surfaces = view.surfaces
    bending = rng.random(surfaces) < 0.5
    bending[view.objects] = bending[-1] = False
    vector = rng.normal(size=(surfaces, WAVES, 2)) * 0.7
    steepness = rng.dirichlet([1] * (WAVES + 1), surfaces)[:, :WAVES] * STEEPEST
    length = 2 * np.pi * np.linalg.norm(vector, axis=-1)
    direction = rng.normal(size=(surfaces, WAVES, 2))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    amplitude = (steepness / length.clip(0.5) * bending[:, None])[..., None] * direction
    rate = rng.normal(size=(surfaces, WAVES)) * min(0.6, 0.08 * view.speed)
    return {"wave_vector": vector, "wave_amplitude": amplitude, "wave_rate": rate}


def _draw_outlines(rng: np.random.Generator, view: _View, has_floor: bool) -> np.ndarray:
    """(L, 7) parameters of the outlines; some objects are absent."""
    objects = view.objects
    outline = np.stack([_outline(rng) for _ in range(view.surfaces)])
    outline[rng.random(view.surfaces) < 0.15, 0] = EMPTY
    outline[objects:] = [EVERYWHERE, 1, 0, 1, 0, 0, 1]
    if not has_floor:
        outline[objects, 0] = EMPTY
    return outline


def _outline(rng: np.random.Generator) -> np.ndarray:
    """(7,) of one object: an irregular shape, sometimes cut into thin bars."""
    aspect = np.exp(rng.normal() * 0.5)
    ripple = rng.choice([0, rng.uniform(0.1, 0.6)])
    bars, width = (rng.uniform(0.5, 3), rng.uniform(0.04, 0.3)) if rng.random() < 0.25 else (0, 1)
    power = rng.choice([1.2, 2.0, 2.0, 4.0, 12.0])
    return np.array([1.0, aspect, ripple, power, bars, rng.uniform(0, 6.3), width])


def _draw_paint(rng: np.random.Generator, view: _View) -> Arrays:
    """Colour matrices and repeats of coarse and fine texture; some surfaces are nearly plain."""
    surfaces = view.surfaces
    contrast = np.array([_log_uniform(rng, 0.25, 1.1) for _ in range(surfaces)])
    contrast[rng.random(surfaces) < 0.12] = 0.03
    fine = contrast * np.array([_log_uniform(rng, 0.02, 0.5) for _ in range(surfaces)])
    mix = np.eye(3) + 0.2 * rng.normal(size=(surfaces, 2, 3, 3))
    repeats = [[_log_uniform(rng, 0.15, 2), _log_uniform(rng, 0.5, 4)] for _ in range(surfaces)]
    return {"paint": mix * np.stack([contrast, fine], 1)[..., None, None], "repeats": repeats}


def _draw_lighting(rng: np.random.Generator, view: _View) -> Arrays:
    """Shadow, and the light without its rate, which is drawn last."""
    width = view.size[1]
    shadow = [*rng.normal(size=2) * 0.06 * width, rng.choice([0, rng.uniform(0.15, 0.6)])]
    vector = rng.normal(size=2) * 4 / width
    light = [rng.choice([0, rng.uniform(0, 0.3)]), *vector, rng.uniform(0, 6.3)]
    return {"shadow": shadow, "light": light}


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
