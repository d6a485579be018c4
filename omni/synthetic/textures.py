"""Procedural textures: seeded, seamless images that surfaces of synthetic scenes are covered with.

Every generator returns a `Texture` whose image is (S, S, 3) float32 RGB in [0, 1] and tiles.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree

__all__ = ["Texture", "blobs", "bricks", "noise", "plain", "planks", "plaster", "stones", "stripes"]

SIDE = 512
"""pixels per texture edge"""


@dataclass(frozen=True)
class Texture:
    """A seamless image pyramid; texture coordinate 1 is one repeat of the image."""

    levels: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, image: np.ndarray) -> "Texture":
        """Build the pyramid of a seamless (S, S, 3) float image."""
        levels = [np.clip(image, 0, 1).astype(np.float32)]
        while len(levels[-1]) > 16:
            half = (len(levels[-1]) // 2,) * 2
            levels.append(cv2.resize(levels[-1], half, interpolation=cv2.INTER_AREA))
        return cls(tuple(levels))

    def sample(self, uv: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Look up colours.

        Args:
            uv: (N, 2) texture coordinates, any range.
            footprint: (N,) width of a pixel in texture coordinates, chooses the level.

        Returns:
            (N, 3) float32.
        """
        level = np.log2(np.maximum(footprint * SIDE, 1e-9)).round().astype(int)
        level = level.clip(0, len(self.levels) - 1)
        colors = np.empty((len(uv), 3), np.float32)
        for index in np.unique(level):
            chosen = np.flatnonzero(level == index)
            colors[chosen] = _lookup(self.levels[index], uv[chosen])
        return colors


def _lookup(image: np.ndarray, uv: np.ndarray) -> np.ndarray:
    side, row = len(image), 1024  # cv2.remap takes images of less than 32768 rows
    xy = ((uv % 1) * side - 0.5).astype(np.float32)
    shape = (-(-len(uv) // row), row)
    x, y = np.resize(xy[:, 0], shape), np.resize(xy[:, 1], shape)
    out = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return out.reshape(-1, 3)[: len(uv)]


def plain(rng: np.random.Generator, color: tuple, contrast: float = 0.02) -> Texture:
    """One colour with barely visible structure: the aperture problem everywhere."""
    return Texture.of(np.array(color) + contrast * _fractal(rng, 1.5)[..., None])


def noise(rng: np.random.Generator, colors: list, roughness: float = 1.3) -> Texture:
    """Multi-octave (1/f^roughness) noise through a palette of RGB `colors`."""
    return Texture.of(_palette(_fractal(rng, roughness), colors))


def plaster(rng: np.random.Generator, colors: list) -> Texture:
    """A painted wall: slow drifts of colour under fine grain and scattered specks."""
    image = _palette(_fractal(rng, 2.2), colors) + 0.05 * _fractal(rng, 0.7)[..., None]
    specks = _fractal(rng, 0.9) > 2.3
    return Texture.of(np.where(specks[..., None], 0.6 * image, image))


def planks(rng: np.random.Generator, colors: list, count: int = 6) -> Texture:
    """Wooden boards along x, each shifted and tinted, with dark gaps."""
    grain = cv2.resize(_fractal(rng, 1.2)[:, : SIDE // 8], (SIDE, SIDE))
    grain = (grain + grain[:, ::-1]) / 2
    y = np.arange(SIDE) * count / SIDE
    shift = rng.integers(0, SIDE, count)[y.astype(int)]
    columns = (np.arange(SIDE) + shift[:, None]) % SIDE
    grain = grain[np.arange(SIDE)[:, None], columns]
    tint = rng.uniform(0.8, 1.15, count)[y.astype(int)][:, None, None]
    gap = np.clip((0.5 - np.abs(y % 1 - 0.5)) * 30, 0.35, 1)[:, None, None]
    joint = np.clip(np.minimum(columns, SIDE - columns) / 3, 0.35, 1)[..., None]
    return Texture.of(_palette(grain, colors) * tint * gap * joint)


def stones(rng: np.random.Generator, colors: list, count: int = 90) -> Texture:
    """Voronoi cells, each of a colour of its own, with darker joints between them."""
    sites = rng.random((count, 2))
    tiled = np.concatenate([sites + (dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
    distance, index = (np.asarray(found) for found in cKDTree(tiled).query(_grid(), k=2))
    tone = _palette(rng.normal(size=count), colors)[index[..., 0] % count]
    joint = np.clip((distance[..., 1] - distance[..., 0]) * np.sqrt(count) * 6, 0, 1)
    grain = 1 + 0.12 * _fractal(rng, 0.9)[..., None]
    return Texture.of(tone * grain * (0.3 + 0.7 * joint[..., None]))


def bricks(rng: np.random.Generator, colors: list, mortar: tuple, rows: int = 10) -> Texture:
    """Staggered bricks (an even number of rows), each tinted, with grain."""
    x, y = np.moveaxis(_grid(), -1, 0)
    row = (y * rows).astype(int)
    x = x * rows / 2 + 0.5 * (row % 2)
    column = np.floor(x).astype(int) % (rows // 2)
    tone = _palette(rng.normal(size=(rows, rows)), colors)[row, column]
    edge = np.minimum(0.5 - np.abs(x % 1 - 0.5), (0.5 - np.abs(y * rows % 1 - 0.5)) / 2)
    inside = np.clip((edge - 0.03) * 40, 0, 1)[..., None]
    grain = 1 + 0.1 * _fractal(rng, 0.8)[..., None]
    return Texture.of((tone * inside + np.array(mortar) * (1 - inside)) * grain)


def stripes(rng: np.random.Generator, colors: list, count: int = 4, warp: float = 0.0) -> Texture:
    """Hard-edged bands along y, repeating through `colors`, bent by noise of strength `warp`."""
    x = _grid()[..., 0] * count * len(colors) + warp * _fractal(rng, 2.0)
    index, fraction = np.floor(x).astype(int), x % 1
    soft = np.clip((fraction - 0.5) * 16 + 0.5, 0, 1)[..., None]
    bands = np.array(colors)
    image = bands[index % len(bands)] * (1 - soft) + bands[(index + 1) % len(bands)] * soft
    return Texture.of(image * (1 + 0.08 * _fractal(rng, 0.9)[..., None]))


def blobs(rng: np.random.Generator, ground: tuple, colors: list, count: int = 60) -> Texture:
    """Overlapping discs of all sizes on a `ground` colour, with faint grain."""
    image = np.full((SIDE, SIDE, 3), ground, np.float64)
    axis = (np.arange(SIDE) + 0.5) / SIDE
    for _ in range(count):
        center, radius = rng.random(2), 0.02 + 0.07 * rng.random() ** 2
        x, y = ((axis - value + 0.5) % 1 - 0.5 for value in center)
        distance = np.sqrt(x**2 + y[:, None] ** 2)
        cover = np.clip((radius - distance) * SIDE / 2 + 0.5, 0, 1)
        touched = cover > 0
        weight = cover[touched][:, None]
        color = np.array(colors[rng.integers(len(colors))])
        image[touched] = image[touched] * (1 - weight) + color * weight
    return Texture.of(image * (1 + 0.07 * _fractal(rng, 0.9)[..., None]))


def _grid() -> np.ndarray:
    """(S, S, 2) texture coordinates (x, y) of the pixel centres."""
    axis = (np.arange(SIDE) + 0.5) / SIDE
    return np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1)


def _fractal(rng: np.random.Generator, roughness: float) -> np.ndarray:
    """(S, S) seamless noise of zero mean and unit variance with a 1/f^roughness spectrum."""
    fy, fx = np.fft.fftfreq(SIDE)[:, None] * SIDE, np.fft.rfftfreq(SIDE)[None] * SIDE
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(SIDE, SIDE))) / frequency**roughness
    field = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    return field / field.std()


def _palette(value: np.ndarray, colors: list) -> np.ndarray:
    """Map values of roughly unit variance to RGB, evenly through `colors`."""
    palette = np.asarray(colors, np.float64)
    stops = np.linspace(-1.8, 1.8, len(palette))
    return np.stack([np.interp(value, stops, channel) for channel in palette.T], axis=-1)
