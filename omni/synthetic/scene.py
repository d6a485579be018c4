"""What a synthetic scene is, and the parts that several share: a room, outlines, colours, motion.

The room has its wall at depth 7 and its floor 1.3 below the eye.
"""

from dataclasses import dataclass

import numpy as np

from omni.synthetic import textures
from omni.synthetic.surfaces import Camera, Path, Sheet, Surface

WALL, FLOOR = 7.0, 1.3
UPRIGHT, LYING = Path(), Path((np.pi / 2, 0, 0))

CREAM, RED, NAVY, TEAL = (0.95, 0.91, 0.82), (0.82, 0.2, 0.16), (0.1, 0.22, 0.42), (0.16, 0.55, 0.5)
GOLD, ORANGE, PLUM, SKY = (
    (0.95, 0.73, 0.24),
    (0.9, 0.45, 0.15),
    (0.42, 0.16, 0.38),
    (0.4, 0.68, 0.86),
)
WOOD = [(0.33, 0.2, 0.11), (0.62, 0.41, 0.25), (0.8, 0.6, 0.41)]
CLAY = [(0.45, 0.2, 0.14), (0.66, 0.36, 0.25), (0.77, 0.52, 0.4)]
ROCK = [(0.28, 0.33, 0.31), (0.56, 0.54, 0.47), (0.76, 0.72, 0.64)]


@dataclass(frozen=True)
class Scene:
    """What is seen and how.

    background: surfaces labelled 0; objects: surfaces labelled 1, 2, ... in order.
    shading: 0 constant colours, 1 lit by a lamp at upper left with soft shadows.
    shutter: fraction of a frame that the shutter is open (motion blur).
    gain: brightness of red, green and blue over time.
    """

    camera: Camera
    background: tuple[Surface, ...]
    objects: tuple[Surface, ...]
    shading: float = 1.0
    shutter: float = 0.0
    gain: Path = Path((1.0, 1.0, 1.0))

    @property
    def surfaces(self) -> tuple[Surface, ...]:
        """All surfaces, background first."""
        return self.background + self.objects


def room(wall: textures.Texture, floor: textures.Texture) -> tuple[Surface, ...]:
    """Wall and floor."""
    return (
        Sheet(wall, Path((0, 0, WALL)), UPRIGHT, repeats=0.3),
        Sheet(floor, Path((0, FLOOR, 0)), LYING, repeats=0.4),
    )


def rectangle(width: float, height: float) -> dict:
    """Outline of a `Sheet`: keyword arguments."""
    return {
        "covers": lambda u: (np.abs(u) <= (width / 2, height / 2)).all(-1),
        "extent": float(np.hypot(width, height)) / 2,
    }


def star(radius: float, points: int, depth: float) -> dict:
    """Outline of a `Sheet` with so many points, `depth` a share of the radius."""

    def covers(u: np.ndarray) -> np.ndarray:
        angle = np.arctan2(u[:, 1], u[:, 0])
        return np.hypot(*u.T) <= radius * (1 - depth + depth * np.cos(points * angle))

    return {"covers": covers, "extent": radius}


def sway(amplitude: tuple, period: float, rng: np.random.Generator) -> tuple:
    """A wave of `Path` with a random phase; period in frames."""
    return (amplitude, period, float(rng.uniform(0, 2 * np.pi)))
