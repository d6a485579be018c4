"""Scenes that every seed draws anew: objects, animals and desks of random make and motion."""

import numpy as np

from omni.synthetic import textures
from omni.synthetic.scene import (
    CREAM,
    FLOOR,
    GOLD,
    NAVY,
    ORANGE,
    PLUM,
    RED,
    SKY,
    TEAL,
    UPRIGHT,
    WALL,
    Scene,
    rectangle,
    room,
    sway,
)
from omni.synthetic.surfaces import Box, Camera, Ellipsoid, Joint, Path, Ripple, Sheet, Surface


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
        sway(tuple(reach * rng.normal(size=3) * share * (1, 0.7, 0.3)), period, rng)
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
    outline = rectangle(*(radius * rng.uniform(1, 3, 2)))
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


def mixed(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Everything at random: objects, thin bars, camera, blur and flicker."""
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
    surroundings = room(_any_cover(rng), _any_cover(rng))
    gain = Path((1.0, 1.0, 1.0), waves=(sway((flicker,) * 3, rng.uniform(5, 20), rng),))
    return Scene(camera, surroundings, tuple(objects), 1.0, shutter, gain)


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


def walk(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Animals on four legs that the camera follows."""
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
    surroundings = room(_any_cover(rng), _any_cover(rng))
    return Scene(camera, surroundings, tuple(objects), 1.0, shutter)


def desk(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """A still desk full of things past which a camera is carried by hand."""
    top, near, far = rng.uniform(0.4, 0.9), rng.uniform(1.5, 2.2), rng.uniform(4, 6)
    half = (rng.uniform(1.2, 2.2), 0.05, 0.5 * (far - near))
    desk = Box(_any_cover(rng), Path((0, top + 0.05, 0.5 * (near + far))), UPRIGHT, half=half)
    objects: list[Surface] = [desk]
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
    tremble = sway(tuple(rng.uniform(0.001, 0.006) * rng.normal(size=3)), rng.uniform(4, 12), rng)
    camera = Camera(
        size,
        Path((0, -0.3, 0), waves=(sway(tuple(hand * rng.normal(size=3)), walk, rng),)),
        Path((-0.25, 0, 0), waves=(sway(tuple(aim * rng.normal(size=3)), look, rng), tremble)),
        focal=rng.uniform(0.8, 1.1),
    )
    shutter = rng.uniform(0.1, 0.5) * (rng.random() < 0.5)
    drift = sway(tuple(0.04 * rng.normal(size=3)), rng.uniform(30, 120), rng)
    gain = Path((1.0, 1.0, 1.0), waves=(drift,))
    surroundings = room(_any_cover(rng), _any_cover(rng))
    return Scene(camera, surroundings, tuple(objects), 1.0, shutter, gain)
