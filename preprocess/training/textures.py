"""A bank of procedural textures on the training device, looked up at random places at once.

Natural photographs would help, but no dependency ships any: so noise with natural spectra, dead
leaves (whose edge statistics are those of photographs), and the patterns of `omni.synthetic`.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from omni.synthetic import (
    SIDE,
    Texture,
    blobs,
    bricks,
    noise,
    planks,
    plaster,
    stones,
    stripes,
)

__all__ = ["TextureBank", "leaves"]


class TextureBank:
    """`count` seamless textures with their mip pyramids, as one table of 8-bit RGB rows.

    Args:
        count: number of textures; every kind occurs from 10 on.
        seed: the same one gives the same bank.
        device: where lookups happen.
    """

    def __init__(self, count: int, seed: int, device: torch.device | str = "cpu"):
        # To 8 bits one by one: as floats, a whole bank takes four times the memory.
        pyramids = [list(map(_eight_bit, _texture(index, seed).levels)) for index in range(count)]
        sides = [len(level) for level in pyramids[0]]
        rows = [level.reshape(-1, 3) for pyramid in pyramids for level in pyramid]
        self.count = count
        self._table = torch.from_numpy(np.concatenate(rows)).to(device)
        self._sides = torch.tensor(sides, device=device)
        self._starts = torch.tensor(np.cumsum([0, *np.square(sides)])[:-1], device=device)
        self._size = int(np.square(sides).sum())

    def sample(self, index: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
        """Bilinear colours `(..., 3)` in [0, 1] from the level that fits each pixel.

        Args:
            index: `(...)` int64 texture.
            uv: `(..., 2)` texture coordinates; 1 is one repeat.
            footprint: `(...)` width of a pixel in texture coordinates.
        """
        level = torch.log2((footprint * SIDE).clamp(min=1e-6)).round().long()
        level = level.clamp(0, len(self._sides) - 1)
        side, start = self._sides[level], index * self._size + self._starts[level]
        position = (uv - uv.floor()) * side[..., None] - 0.5
        corner = position.floor()
        right, down = (position - corner)[..., None].unbind(-2)
        x0, y0 = corner.long().unbind(-1)

        def texel(dx: int, dy: int) -> Tensor:
            row = start + (y0 + dy) % side * side + (x0 + dx) % side
            return self._table[row].float()

        upper = torch.lerp(texel(0, 0), texel(1, 0), right)
        lower = torch.lerp(texel(0, 1), texel(1, 1), right)
        return torch.lerp(upper, lower, down) / 255


def leaves(rng: np.random.Generator, count: int = 1200) -> Texture:
    """Dead leaves: opaque ellipses and polygons, radii by a power law, covering each other.

    Source: Lee, Mumford and Huang, Occlusion Models for Natural Images, IJCV 2001; used to train
    vision networks by Baradad et al., Learning to See by Looking at Noise, NeurIPS 2021.
    """
    image = rng.random(3) + 0.1 * noise(rng, [(0, 0, 0), (1, 1, 1)]).levels[0]
    image = _eight_bit(image.clip(0, 1))  # OpenCV smooths outlines on 8 bits alone
    radii = np.sort(SIDE * 0.006 / (rng.random(count) + 2e-3) ** 0.6)[::-1].clip(max=SIDE / 4)
    tones = noise(rng, _palette(rng), 1.5).levels[0].reshape(-1, 3)
    for radius in radii:
        center, color = rng.uniform(0, SIDE, 2), 255 * tones[rng.integers(len(tones))]
        corners = rng.integers(3, 7) if rng.random() < 0.4 else 24
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else _CIRCLE
        stretch, turn = rng.uniform(0.3, 1), rng.uniform(0, 2 * np.pi)
        outline = np.stack([np.cos(angle), stretch * np.sin(angle)], -1) * radius
        spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        outline = outline @ spin + center
        for shift in np.argwhere(np.ones((3, 3))) - 1:
            moved = outline + shift * SIDE
            if (moved.max(0) >= 0).all() and (moved.min(0) < SIDE).all():
                points = np.rint(moved * 16).astype(np.int32)
                cv2.fillPoly(image, [points], color.tolist(), cv2.LINE_AA, shift=4)
    grain = noise(rng, [(0.8,) * 3, (1.2,) * 3], 0.8).levels[0]
    return Texture.of(image / 255 * np.maximum(grain, 0.8))


def _eight_bit(image: np.ndarray) -> np.ndarray:
    return np.rint(image * 255).astype(np.uint8)


_CIRCLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)


def _texture(index: int, seed: int) -> Texture:
    """Texture `index` of the bank `seed`: kinds in turn, everything else drawn."""
    rng = np.random.default_rng((seed, index))
    colors = _palette(rng)
    ground = tuple(colors[0])
    kinds = (
        lambda: leaves(rng, int(rng.integers(300, 1500))),
        lambda: noise(rng, colors, rng.uniform(0.7, 1.6)),
        lambda: plaster(rng, colors),
        lambda: leaves(rng, int(rng.integers(300, 1500))),
        lambda: stones(rng, colors, int(rng.integers(20, 200))),
        lambda: planks(rng, colors, int(rng.integers(3, 12))),
        lambda: blobs(rng, ground, colors, int(rng.integers(20, 200))),
        lambda: bricks(rng, colors, ground, 2 * int(rng.integers(2, 9))),
        lambda: stripes(rng, colors, int(rng.integers(1, 5)), rng.uniform(0, 1.5)),
        lambda: noise(rng, colors, rng.uniform(1.0, 1.4)),
    )
    return kinds[index % len(kinds)]()


def _palette(rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Three to five colours around one; brightness differs more than hue, as in photographs."""
    count, deviation = rng.integers(3, 6), rng.choice([0.15, 0.3])
    base = rng.uniform(0.2, 0.8) + 0.15 * rng.normal(size=3)
    bright, hue = rng.normal(size=(count, 1)), 0.5 * rng.normal(size=(count, 3))
    colors = (base + deviation * (bright + hue)).clip(0, 1)
    return [tuple(color) for color in colors]
