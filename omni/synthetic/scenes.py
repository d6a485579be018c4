"""The named synthetic scenes, one per difficulty.

Each is a function of the frame size and a random generator, so that seeds give other textures and
phases of the same kind of scene. Motion is periodic or slow: any number of frames makes sense.
"""

from collections.abc import Callable

import numpy as np

from omni.synthetic import textures
from omni.synthetic.random_scenes import desk, mixed, walk
from omni.synthetic.scene import (
    CLAY,
    CREAM,
    FLOOR,
    GOLD,
    NAVY,
    ORANGE,
    PLUM,
    RED,
    ROCK,
    SKY,
    TEAL,
    UPRIGHT,
    WOOD,
    Scene,
    rectangle,
    room,
    star,
    sway,
)
from omni.synthetic.surfaces import Box, Camera, Ellipsoid, Path, Ripple, Sheet

__all__ = [
    "SCENES",
]


def _demo(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    wall = textures.bricks(rng, CLAY, (0.74, 0.7, 0.64))
    camera = Camera(
        size,
        Path((-0.35, -0.1, 0), (0.022, 0, 0), (((0, 0.04, 0), 37, 0.0),)),
        Path((0.06, -0.06, 0), (0, 0.002, 0), (((0, 0, 0.02), 45, 0.5),)),
        focal=0.95,
        zoom=1.004,
    )
    flag = Ripple(
        (((0.05, 0.05), (5.0, 1.0), 0.3, 0.0), ((0.02, 0.04), (2.0, -3.0), 0.21, 1.0)),
    )
    objects = (
        Sheet(
            textures.stripes(rng, [NAVY, CREAM, RED, GOLD], 1, 0.5),
            Path((1.35, -0.75, 6.0), waves=(((0, 0.04, 0), 40, 0),)),
            Path((0, 0.25, 0), waves=(((0.1, 0.18, 0.06), 33, 0),)),
            0.45,
            ripple=flag,
            **rectangle(2.1, 1.3),
        ),
        Ellipsoid(
            textures.stripes(rng, [RED, CREAM, SKY, CREAM, GOLD, CREAM], 1),
            Path((-1.5, FLOOR - 0.56, 4.3), (0.075, 0, 0)),
            Path((0.3, 0.4, 0), (0, 0, 0.075 / 0.56)),
            1,
            radii=Path((0.56, 0.56, 0.56)),
        ),
        Box(
            textures.planks(rng, [(0.2, 0.35, 0.33), TEAL, (0.5, 0.75, 0.66)], 4),
            Path((1.25, 0.35, 5.1), (-0.045, 0, 0), (((0, 0.25, 0.2), 30, 0),)),
            Path((0.4, 0.3, 0.1), (0.05, 0.07, -0.03)),
            1.3,
            half=(0.42, 0.42, 0.42),
        ),
        Ellipsoid(
            textures.blobs(rng, CREAM, [PLUM, ORANGE, TEAL]),
            Path((-1.35, -0.5, 5.2), (0.01, 0, 0), (((0, 0.3, 0), 22, 1.0),)),
            Path((0.2, 0, 0.4), (0.01, 0.09, 0.02)),
            1,
            radii=Path((0.5, 0.62, 0.5), waves=(((0.09, -0.12, 0.09), 11, 1.0),)),
        ),
        Sheet(
            textures.noise(rng, [ORANGE, GOLD, CREAM], 1.5),
            Path((0.15, -0.85, 4.4), (-0.012, 0.006, 0), (((0.15, 0.1, 0), 41, 2.0),)),
            Path((0.1, 0.2, 0), (0, 0, 0.085)),
            0.8,
            ripple=Ripple((((0.03, 0.03), (4.0, -4.0), 0.35, 0.0),)),
            **star(0.55, 5, 0.22),
        ),
        Box(textures.stones(rng, ROCK), Path((0.42, 0, 2.7)), UPRIGHT, 0.9, half=(0.1, 3, 0.1)),
    )
    return Scene(camera, room(wall, textures.planks(rng, WOOD)), objects)


def _cloth(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    camera = Camera(size, Path((0, 0, 0), waves=(((0.15, 0.05, 0.2), 60, 0),)))
    waves = (
        ((0.06, 0.03), (3.0, 1.5), 0.22, rng.uniform(0, 6)),
        ((0.02, 0.06), (-1.5, 3.5), 0.31, rng.uniform(0, 6)),
        ((0.012, 0.012), (7.0, 5.0), 0.4, rng.uniform(0, 6)),
    )
    cloth = Sheet(
        textures.blobs(rng, NAVY, [CREAM, GOLD, RED, SKY], 90),
        Path((0, -0.15, 4.2), waves=(((0.1, 0, 0), 50, 0),)),
        Path((0, 0, 0), waves=(((0.15, 0.25, 0.05), 45, 0),)),
        0.45,
        ripple=Ripple(waves),
        **rectangle(3.2, 2.3),
    )
    ball = Ellipsoid(
        textures.stripes(rng, [ORANGE, CREAM], 2),
        Path((0, 0.2, 3.1), waves=(((1.5, 0.15, 0), 42, 0.4),)),
        Path((0, 0, 0), (0.02, 0.03, 0.08)),
        1,
        radii=Path((0.3, 0.3, 0.3)),
    )
    wall = textures.plaster(rng, [(0.45, 0.5, 0.47), (0.66, 0.7, 0.64)])
    return Scene(camera, room(wall, textures.planks(rng, WOOD)), (cloth, ball))


def _bars(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    def covers(u: np.ndarray) -> np.ndarray:
        return (np.abs(u[:, 0] % 0.32 - 0.16) < 0.028) | (np.abs(u[:, 1] % 0.9 - 0.45) < 0.022)

    camera = Camera(size, Path((-0.5, 0, 0), (0.028, 0, 0), (((0, 0.04, 0), 30, 0),)))
    rail = textures.noise(rng, [(0.1, 0.12, 0.12), (0.24, 0.26, 0.25)])
    fence = Sheet(rail, Path((0, 0, 2.3)), Path((0, 0.1, 0)), covers=covers)
    drum = Ellipsoid(
        textures.blobs(rng, TEAL, [CREAM, GOLD, PLUM]),
        Path((0, 0.2, 4.5), waves=(((1.3, 0.2, 0), 48, 0),)),
        Path((0, 0, 0), (0.02, 0.06, 0.03)),
        1,
        radii=Path((0.65, 0.65, 0.65)),
    )
    crate = Box(
        textures.planks(rng, WOOD, 4),
        Path((1.2, FLOOR - 0.45, 5.2), (-0.02, 0, 0)),
        Path((0, 0.5, 0), (0, 0.03, 0)),
        half=(0.45, 0.45, 0.45),
    )
    wall = textures.stones(rng, ROCK)
    return Scene(camera, room(wall, textures.planks(rng, WOOD)), (fence, drum, crate))


def _shake(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    camera = Camera(
        size,
        Path((0, 0, 0), waves=(((0.3, 0, 0), 25, 0),)),
        Path(
            waves=(
                ((0, 0.12, 0), 26, 0.0),
                sway((0.02, 0.012, 0.02), 7, rng),
                sway((0.012, 0.016, 0.012), 4.3, rng),
            )
        ),
        focal=0.95,
    )
    tunes = ((1.5, 17, 4.4, RED), (1.2, 13, 5.0, SKY), (1.7, 21, 5.6, GOLD))
    objects = [
        Ellipsoid(
            textures.blobs(rng, color, [CREAM, NAVY, TEAL], 40),
            Path((0, -0.5 + 0.5 * i, z), waves=(sway((x, 0.3, 0.1), period, rng),)),
            Path((0, 0, 0), tuple(rng.uniform(-0.25, 0.25, 3))),
            1,
            radii=Path((0.42, 0.42, 0.42)),
        )
        for i, (x, period, z, color) in enumerate(tunes)
    ]
    box = Box(
        textures.stones(rng, [PLUM, ORANGE, CREAM], 40),
        Path((0.3, -0.2, 4.8), waves=(sway((0.9, 0.8, 0.2), 19, rng),)),
        Path((0, 0, 0), (0.16, -0.1, 0.12)),
        half=(0.4, 0.3, 0.35),
    )
    light = Path((1.0, 1.0, 1.0), waves=(((0.12, 0.11, 0.1), 14, 0), ((0.03, 0.04, 0.05), 5, 1)))
    surroundings = room(textures.noise(rng, [NAVY, TEAL, CREAM], 1.5), textures.stones(rng, ROCK))
    return Scene(camera, surroundings, (*objects, box), shutter=0.6, gain=light)


def _blocks(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    camera = Camera(
        size,
        Path((0, -0.3, 0), waves=(((0.7, 0.1, 0.3), 70, 0),)),
        Path((-0.08, 0, 0), waves=(((0, -0.12, 0), 70, 0),)),
    )
    colors = [[RED, CREAM], [NAVY, SKY, CREAM], [GOLD, ORANGE], [TEAL, CREAM], [PLUM, ORANGE]]
    objects = []
    for i, palette in enumerate(colors):
        x, half = -1.6 + 0.8 * i, tuple(rng.uniform(0.28, 0.46, 3))
        cover = textures.noise(rng, palette, 1.4) if i % 2 else textures.stones(rng, palette, 30)
        path = Path(
            (x, 0.1 - 0.6 * (i % 2), 4.2 + 0.5 * (i % 3)), waves=(sway((0.5, 0.3, 0.4), 50, rng),)
        )
        turn = Path(tuple(rng.uniform(-1, 1, 3)), tuple(rng.uniform(-0.08, 0.08, 3)))
        objects.append(Box(cover, path, turn, half=half))
    surroundings = room(
        textures.plaster(rng, [SKY, (0.6, 0.75, 0.8), CREAM]), textures.planks(rng, WOOD)
    )
    return Scene(camera, surroundings, tuple(objects))


def _blank(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    camera = Camera(size, Path((0, -0.2, 0), waves=(((0.12, 0, 0), 60, 0),)), Path((-0.06, 0, 0)))
    objects = [
        Box(
            textures.plain(rng, color),
            Path((-1.2 + 1.2 * i, 0.6, 4.6), waves=(sway((0.3, 0.3, 0.2), 44, rng),)),
            Path((0, rng.uniform(0, 1), 0), (0, 0.04 * (i - 1), 0.01)),
            half=(0.38, 0.38, 0.38),
        )
        for i, color in enumerate((RED, GOLD, NAVY))
    ]
    surroundings = room(
        textures.plain(rng, (0.6, 0.6, 0.58)), textures.plain(rng, (0.45, 0.44, 0.42))
    )
    return Scene(camera, surroundings, tuple(objects))


SCENES: dict[str, Callable[[tuple[int, int], np.random.Generator], Scene]] = {
    "demo": _demo,
    "cloth": _cloth,
    "bars": _bars,
    "shake": _shake,
    "blocks": _blocks,
    "blank": _blank,
    "mixed": mixed,
    "walk": walk,
    "desk": desk,
}
"""demo: all at once; cloth: non-rigid; bars: thin occluders; shake: fast, blurred, flickering;
blocks: rotating boxes; blank: low texture; mixed: everything at random, another scene each seed;
walk: animals on four legs, another scene each seed; desk: a still desk full of things past which a
camera is carried by hand, another scene each seed."""
