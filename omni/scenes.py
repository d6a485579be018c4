"""The named synthetic scenes, one per difficulty. A room: wall at depth 7, floor 1.3 below the eye.

Each is a function of the frame size and a random generator, so that seeds give other textures and
phases of the same kind of scene. Motion is periodic or slow: any number of frames makes sense.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omni import textures
from omni.surfaces import Box, Camera, Ellipsoid, Joint, Path, Ripple, Sheet, Surface

__all__ = ["SCENES", "Scene"]

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


def _room(wall: textures.Texture, floor: textures.Texture) -> tuple[Surface, ...]:
    return (
        Sheet(wall, Path((0, 0, WALL)), UPRIGHT, repeats=0.3),
        Sheet(floor, Path((0, FLOOR, 0)), LYING, repeats=0.4),
    )


def _rectangle(width: float, height: float) -> dict:
    return {
        "covers": lambda u: (np.abs(u) <= (width / 2, height / 2)).all(-1),
        "extent": float(np.hypot(width, height)) / 2,
    }


def _star(radius: float, points: int, depth: float) -> dict:
    def covers(u: np.ndarray) -> np.ndarray:
        angle = np.arctan2(u[:, 1], u[:, 0])
        return np.hypot(*u.T) <= radius * (1 - depth + depth * np.cos(points * angle))

    return {"covers": covers, "extent": radius}


def _sway(amplitude: tuple, period: float, rng: np.random.Generator) -> tuple:
    return (amplitude, period, float(rng.uniform(0, 2 * np.pi)))


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
            **_rectangle(2.1, 1.3),
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
            **_star(0.55, 5, 0.22),
        ),
        Box(textures.stones(rng, ROCK), Path((0.42, 0, 2.7)), UPRIGHT, 0.9, half=(0.1, 3, 0.1)),
    )
    return Scene(camera, _room(wall, textures.planks(rng, WOOD)), objects)


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
        **_rectangle(3.2, 2.3),
    )
    ball = Ellipsoid(
        textures.stripes(rng, [ORANGE, CREAM], 2),
        Path((0, 0.2, 3.1), waves=(((1.5, 0.15, 0), 42, 0.4),)),
        Path((0, 0, 0), (0.02, 0.03, 0.08)),
        1,
        radii=Path((0.3, 0.3, 0.3)),
    )
    wall = textures.plaster(rng, [(0.45, 0.5, 0.47), (0.66, 0.7, 0.64)])
    return Scene(camera, _room(wall, textures.planks(rng, WOOD)), (cloth, ball))


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
    return Scene(camera, _room(wall, textures.planks(rng, WOOD)), (fence, drum, crate))


def _shake(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    camera = Camera(
        size,
        Path((0, 0, 0), waves=(((0.3, 0, 0), 25, 0),)),
        Path(
            waves=(
                ((0, 0.12, 0), 26, 0.0),
                _sway((0.02, 0.012, 0.02), 7, rng),
                _sway((0.012, 0.016, 0.012), 4.3, rng),
            )
        ),
        focal=0.95,
    )
    tunes = ((1.5, 17, 4.4, RED), (1.2, 13, 5.0, SKY), (1.7, 21, 5.6, GOLD))
    objects = [
        Ellipsoid(
            textures.blobs(rng, color, [CREAM, NAVY, TEAL], 40),
            Path((0, -0.5 + 0.5 * i, z), waves=(_sway((x, 0.3, 0.1), period, rng),)),
            Path((0, 0, 0), tuple(rng.uniform(-0.25, 0.25, 3))),
            1,
            radii=Path((0.42, 0.42, 0.42)),
        )
        for i, (x, period, z, color) in enumerate(tunes)
    ]
    box = Box(
        textures.stones(rng, [PLUM, ORANGE, CREAM], 40),
        Path((0.3, -0.2, 4.8), waves=(_sway((0.9, 0.8, 0.2), 19, rng),)),
        Path((0, 0, 0), (0.16, -0.1, 0.12)),
        half=(0.4, 0.3, 0.35),
    )
    light = Path((1.0, 1.0, 1.0), waves=(((0.12, 0.11, 0.1), 14, 0), ((0.03, 0.04, 0.05), 5, 1)))
    room = _room(textures.noise(rng, [NAVY, TEAL, CREAM], 1.5), textures.stones(rng, ROCK))
    return Scene(camera, room, (*objects, box), shutter=0.6, gain=light)


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
            (x, 0.1 - 0.6 * (i % 2), 4.2 + 0.5 * (i % 3)), waves=(_sway((0.5, 0.3, 0.4), 50, rng),)
        )
        turn = Path(tuple(rng.uniform(-1, 1, 3)), tuple(rng.uniform(-0.08, 0.08, 3)))
        objects.append(Box(cover, path, turn, half=half))
    room = _room(textures.plaster(rng, [SKY, (0.6, 0.75, 0.8), CREAM]), textures.planks(rng, WOOD))
    return Scene(camera, room, tuple(objects))


def _blank(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    camera = Camera(size, Path((0, -0.2, 0), waves=(((0.12, 0, 0), 60, 0),)), Path((-0.06, 0, 0)))
    objects = [
        Box(
            textures.plain(rng, color),
            Path((-1.2 + 1.2 * i, 0.6, 4.6), waves=(_sway((0.3, 0.3, 0.2), 44, rng),)),
            Path((0, rng.uniform(0, 1), 0), (0, 0.04 * (i - 1), 0.01)),
            half=(0.38, 0.38, 0.38),
        )
        for i, color in enumerate((RED, GOLD, NAVY))
    ]
    room = _room(textures.plain(rng, (0.6, 0.6, 0.58)), textures.plain(rng, (0.45, 0.44, 0.42)))
    return Scene(camera, room, tuple(objects))


def _any_cover(rng: np.random.Generator) -> textures.Texture:
    """A texture of any kind in any few colours."""
    if rng.random() < 0.5:
        colors = [CREAM, RED, NAVY, TEAL, GOLD, ORANGE, PLUM, SKY]
        palette = [colors[i] for i in rng.permutation(len(colors))[: rng.integers(2, 5)]]
    else:
        base = rng.uniform(0.1, 0.9, 3)
        palette = [
            tuple(np.clip(base + rng.normal(size=3) * rng.uniform(0.05, 0.3), 0.02, 0.98))
            for _ in range(rng.integers(2, 5))
        ]
    kinds = (
        lambda: textures.noise(rng, palette, rng.uniform(1.0, 1.8)),
        lambda: textures.blobs(rng, palette[0], palette[1:], int(rng.integers(20, 100))),
        lambda: textures.stones(rng, palette, int(rng.integers(20, 60))),
        lambda: textures.stripes(rng, palette, int(rng.integers(1, 4))),
        lambda: textures.planks(rng, palette, int(rng.integers(3, 7))),
        lambda: textures.plaster(rng, palette),
        lambda: textures.plain(rng, palette[0]),
    )
    return kinds[rng.choice(len(kinds), p=(0.25, 0.18, 0.18, 0.1, 0.1, 0.12, 0.07))]()


def _wander(reach: float, rng: np.random.Generator) -> tuple:
    """A slow and a fast sway of random directions, mostly sideways."""
    return tuple(
        _sway(tuple(reach * rng.normal(size=3) * share * (1, 0.7, 0.3)), period, rng)
        for share, period in ((1.0, rng.uniform(18, 60)), (0.3, rng.uniform(5, 18)))
    )


def _turn(rate: float, rng: np.random.Generator) -> Path:
    return Path(tuple(rng.uniform(-1, 1, 3)), tuple(rate * rng.normal(size=3)))


def _any_object(pace: float, rng: np.random.Generator) -> Surface:
    cover, radius = _any_cover(rng), float(np.exp(rng.uniform(np.log(0.1), np.log(0.7))))
    place = Path(
        (rng.uniform(-1.6, 1.6), rng.uniform(-0.9, 0.7), rng.uniform(2.8, 6)),
        waves=_wander(pace * rng.uniform(0.3, 1.6), rng),
    )
    spin, kind = _turn(0.08 * pace, rng), rng.integers(3)
    if kind == 0:
        return Box(cover, place, spin, half=tuple(radius * rng.uniform(0.4, 1.2, 3)))
    if kind == 1:
        radii = Path(tuple(radius * rng.uniform(0.7, 1.2, 3)))
        return Ellipsoid(cover, place, spin, 1, radii=radii)
    slope = rng.uniform(-2, 2, 2) / radius
    height = 0.5 / np.linalg.norm(slope) / np.sqrt(2) * rng.uniform(0.1, 1)
    facing = Path((*rng.uniform(-0.4, 0.4, 2), rng.uniform(-1, 1)), (0, 0, 0.03 * pace))
    wave = ((height, height), tuple(slope), rng.uniform(0.1, 0.4), rng.uniform(0, 6))
    outline = _rectangle(*(radius * rng.uniform(1, 3, 2)))
    return Sheet(cover, place, facing, ripple=Ripple((wave,)), **outline)


def _wires(pace: float, rng: np.random.Generator) -> Surface:
    """Thin bars or a mesh close to the camera."""
    apart, width = rng.uniform(0.15, 0.5, 2), rng.uniform(0.006, 0.035, 2)
    crossed = rng.random() < 0.5

    def covers(u: np.ndarray) -> np.ndarray:
        on = np.abs(u % apart - apart / 2) < width
        return on[:, 0] | (crossed & on[:, 1])

    cover = _any_cover(rng)
    place = Path((0, 0, rng.uniform(1.8, 3.2)), waves=_wander(0.1 * pace, rng))
    facing = _turn(0, rng) if rng.random() < 0.5 else Path((0, 0.1, rng.uniform(0, 1.5)))
    return Sheet(cover, place, facing, covers=covers)


def _mixed(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    pace = float(np.exp(rng.uniform(np.log(0.15), np.log(1.6))))
    objects = [_any_object(pace, rng) for _ in range(rng.integers(3, 9))]
    if rng.random() < 0.45:
        objects.append(_wires(pace, rng))
    camera = Camera(
        size,
        Path((0, 0, 0), waves=_wander(0.3 * pace, rng)),
        Path((0, 0, 0), waves=_wander(0.03 * pace, rng)),
        focal=rng.uniform(0.8, 1.1),
    )
    shutter = rng.uniform(0.2, 0.8) * (rng.random() < 0.5)
    flicker = 0.08 * rng.random() * (rng.random() < 0.5)
    room = _room(_any_cover(rng), _any_cover(rng))
    gain = Path((1.0, 1.0, 1.0), waves=(_sway((flicker,) * 3, rng.uniform(5, 20), rng),))
    return Scene(camera, room, tuple(objects), 1.0, shutter, gain)


def _creature(place: Path, heading: float, period: float, rng: np.random.Generator) -> list:
    """An animal with a body, a head, a tail and two pairs of legs, which it swings as it goes."""
    cover = _any_cover(rng)
    length, height = rng.uniform(0.35, 0.6), rng.uniform(0.14, 0.24)
    thick, thigh, shank = rng.uniform(0.03, 0.07), rng.uniform(0.25, 0.4), rng.uniform(0.2, 0.4)
    across = np.array([-np.sin(heading), 0, np.cos(heading)])
    body, swing = Path((0, -heading, 0)), rng.uniform(0.25, 0.7)

    def part(base: Path | Joint, turn: Path, reach: float, width: float) -> tuple:
        """An ellipsoid along y from `base`, and the joint at its end."""
        radii = Path((width, 0.5 * reach + 0.5 * width, width))
        middle = Joint(base, turn, (0, 0.5 * reach, 0))
        return Ellipsoid(cover, middle, turn, 1, radii=radii), Joint(base, turn, (0, reach, 0))

    def hinge(rest: float, reach: float, phase: float) -> Path:
        return Path(tuple(rest * across), waves=((tuple(reach * across), period, phase),))

    trunk = Ellipsoid(cover, place, body, 1, radii=Path((length, height, 0.7 * height)))
    neck = Joint(place, body, (0.9 * length, -0.3 * height, 0))
    nod = hinge(rng.uniform(-2.6, -1.8), 0.2 * rng.random(), rng.uniform(0, 6))
    nape, head = part(neck, nod, rng.uniform(0.15, 0.4), 0.5 * height)
    face = hinge(rng.uniform(-1.4, -0.6), 0.1, 0)
    wag = hinge(rng.uniform(0.5, 1.3), rng.uniform(0.1, 0.6), rng.uniform(0, 6))
    tail = Joint(place, body, (-0.95 * length, -0.2 * height, 0))
    parts = [trunk, nape, part(head, face, 0.25, 0.4 * height)[0]]
    parts.append(part(tail, wag, rng.uniform(0.2, 0.5), 0.4 * thick)[0])
    gait = rng.uniform(0, 6)
    for leg, (along, side) in enumerate([(0.75, 1), (0.75, -1), (-0.75, 1), (-0.75, -1)]):
        hip = Joint(place, body, (along * length, 0.5 * height, 0.5 * side * height))
        phase = gait + np.pi * (leg in (1, 2)) + rng.uniform(-0.5, 0.5)
        upper, knee = part(hip, hinge(0, swing, phase), thigh, 1.3 * thick)
        lower, _ = part(knee, hinge(0.2, swing, phase - 1), shank, thick)
        parts += [upper, lower]
    return parts


def _walk(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    pace = float(np.exp(rng.uniform(np.log(0.01), np.log(0.12))))
    objects = []
    for _ in range(rng.integers(1, 3)):
        heading = rng.choice((0, np.pi)) + rng.uniform(-0.7, 0.7)
        start = (rng.uniform(-0.5, 0.5), FLOOR - rng.uniform(0.7, 1.1), rng.uniform(2.4, 4.5))
        ahead = pace * np.array([np.cos(heading), 0, np.sin(heading)])
        bob = ((0, 0.3 * pace, 0), rng.uniform(5, 15), rng.uniform(0, 6))
        place = Path(tuple(start - 15 * ahead), tuple(ahead), (bob,))
        objects += _creature(place, heading, rng.uniform(9, 40), rng)
    followed = 0.9 * rng.random() * ahead
    objects += [_any_object(0.3, rng) for _ in range(rng.integers(0, 3))]
    if rng.random() < 0.3:
        objects.append(_wires(0.3, rng))
    camera = Camera(
        size,
        Path(tuple(-15 * followed), tuple(followed), _wander(0.1, rng)),
        Path((-0.05, 0, 0), waves=_wander(0.02, rng)),
        focal=rng.uniform(0.8, 1.3),
    )
    shutter = rng.uniform(0.2, 0.6) * (rng.random() < 0.5)
    room = _room(_any_cover(rng), _any_cover(rng))
    return Scene(camera, room, tuple(objects), 1.0, shutter)


def _desk(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    top, near, far = rng.uniform(0.4, 0.9), rng.uniform(1.5, 2.2), rng.uniform(4, 6)
    half = (rng.uniform(1.2, 2.2), 0.05, 0.5 * (far - near))
    desk = Box(_any_cover(rng), Path((0, top + 0.05, 0.5 * (near + far))), UPRIGHT, half=half)
    objects = [desk]
    for _ in range(rng.integers(8, 18)):
        cover, radius = _any_cover(rng), float(np.exp(rng.uniform(np.log(0.1), np.log(0.6))))
        radii = radius * rng.uniform(0.3, 1, 3)
        x, z = rng.uniform(-0.9, 0.9) * half[0], rng.uniform(near + radii[2], far - radii[2])
        place, turn = Path((x, top - radii[1], z)), Path((0, rng.uniform(0, 3), 0))
        if rng.random() < 0.6:
            objects.append(Box(cover, place, turn, 1.5, half=tuple(radii)))
        else:
            objects.append(Ellipsoid(cover, place, turn, 1, radii=Path(tuple(radii))))
    for _ in range(rng.integers(1, 5)):
        place = Path((rng.uniform(-3, 3), rng.uniform(-2, 0), WALL - 0.2))
        objects.append(Box(_any_cover(rng), place, UPRIGHT, half=(*rng.uniform(0.2, 0.9, 2), 0.2)))
    hand, aim = rng.uniform(0.1, 0.45), rng.uniform(0.05, 0.25)
    walk, look = rng.uniform(50, 160), rng.uniform(40, 140)
    tremble = _sway(tuple(rng.uniform(0.001, 0.006) * rng.normal(size=3)), rng.uniform(4, 12), rng)
    camera = Camera(
        size,
        Path((0, -0.3, 0), waves=(_sway(tuple(hand * rng.normal(size=3)), walk, rng),)),
        Path((-0.25, 0, 0), waves=(_sway(tuple(aim * rng.normal(size=3)), look, rng), tremble)),
        focal=rng.uniform(0.8, 1.1),
    )
    shutter = rng.uniform(0.1, 0.5) * (rng.random() < 0.5)
    drift = _sway(tuple(0.04 * rng.normal(size=3)), rng.uniform(30, 120), rng)
    gain = Path((1.0, 1.0, 1.0), waves=(drift,))
    room = _room(_any_cover(rng), _any_cover(rng))
    return Scene(camera, room, tuple(objects), 1.0, shutter, gain)


SCENES: dict[str, Callable[[tuple[int, int], np.random.Generator], Scene]] = {
    "demo": _demo,
    "cloth": _cloth,
    "bars": _bars,
    "shake": _shake,
    "blocks": _blocks,
    "blank": _blank,
    "mixed": _mixed,
    "walk": _walk,
    "desk": _desk,
}
"""demo: all at once; cloth: non-rigid; bars: thin occluders; shake: fast, blurred, flickering;
blocks: rotating boxes; blank: low texture; mixed: everything at random, another scene each seed;
walk: animals on four legs, another scene each seed; desk: a still desk full of things past which a
camera is carried by hand, another scene each seed."""
