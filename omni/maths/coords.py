"""THE coordinate conventions, and the only place that converts between them.

- *raster pixels*: `(x, y)`, the centre of the top-left pixel is `(0.5, 0.5)`, the frame spans
  `[0, W] x [0, H]`. Public results are raster pixels of the original video; everything between
  preprocessing and read-out is raster pixels of the processing resolution. Because the frame
  corners are the origin, changing resolution is a pure scale.
- *normalised*: raster pixels mapped to `[-1, 1]` per axis, `-1` at the left/top frame edge and
  `+1` at the right/bottom edge. This is `grid_sample(align_corners=False)`.
- *array index*: `image[row, column]` is the value at raster point `(column + 0.5, row + 0.5)`.

Sizes are always `(height, width)`. Queries are `(t, y, x)` as in TAP-Vid; time is in frames.
Functions of an `Array` accept numpy and torch arrays and return the same kind.
"""

from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Array",
    "denormalize",
    "grid_queries",
    "inside",
    "normalize",
    "pixel_centers",
    "processing_size",
    "rescale",
    "sample_image",
]

Array = TypeVar("Array", np.ndarray, Tensor)
"""numpy or torch: results are of the kind of the argument."""


def processing_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Size at which a video of `size` (H, W) is processed: short side at most `short_side` pixels.

    Never enlarges; `short_side` 0 keeps the original size. Both sides are at least 1.
    """
    height, width = size
    if short_side <= 0 or min(size) <= short_side:
        return height, width
    ratio = short_side / min(size)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def rescale(xy: Array, source: tuple[int, int], target: tuple[int, int]) -> Array:
    """Map raster pixels of a `source`-sized frame to a `target`-sized one.

    Args:
        xy: `(..., 2)` raster pixels.
        source: (H, W) the points refer to.
        target: (H, W) to express them in.

    Returns:
        `(..., 2)` raster pixels of the target size.
    """
    return xy * _like(xy, (target[1] / source[1], target[0] / source[0]))


def normalize(xy: Array, size: tuple[int, int]) -> Array:
    """Raster pixels `(..., 2)` of a frame of `size` (H, W) to `[-1, 1]` per axis."""
    return xy * _like(xy, (2 / size[1], 2 / size[0])) - 1


def denormalize(xy: Array, size: tuple[int, int]) -> Array:
    """Inverse of `normalize`: `[-1, 1]` per axis to raster pixels."""
    return (xy + 1) * _like(xy, (size[1] / 2, size[0] / 2))


def inside(xy: Array, size: tuple[int, int]) -> Array:
    """`(...)` bool: raster points `(..., 2)` lying in the frame, edges included."""
    x, y = xy[..., 0], xy[..., 1]
    return (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])


def pixel_centers(size: tuple[int, int], stride: int = 1) -> np.ndarray:
    """Raster coordinates `(h', w', 2)` float32 of every `stride`-th pixel centre of a frame.

    The first point lies at the centre of the first stride-by-stride cell, so that a strided grid
    is centred in the frame like the full one. A frame smaller than one cell gets its centre.
    """
    x = np.arange(min(stride, size[1]) / 2, size[1], stride, dtype=np.float32)
    y = np.arange(min(stride, size[0]) / 2, size[0], stride, dtype=np.float32)
    return np.stack(np.meshgrid(x, y, indexing="xy"), axis=-1)


def grid_queries(size: tuple[int, int], frame: float, stride: int) -> np.ndarray:
    """Queries `(N, 3)` float32 `(t, y, x)` on the strided grid of one frame, row by row."""
    xy = pixel_centers(size, stride).reshape(-1, 2)
    return np.concatenate([np.full((len(xy), 1), frame, np.float32), xy[:, ::-1]], axis=1)


def sample_image(image: Tensor, xy: Tensor) -> Tensor:
    """Bilinear samples of one image at raster points, clamped to the border pixels.

    Args:
        image: `(H, W, C)` float.
        xy: `(N, 2)` raster pixels of that image.

    Returns:
        `(N, C)`.
    """
    grid = normalize(xy, (image.shape[0], image.shape[1]))[None, None]
    sampled = F.grid_sample(
        image.movedim(-1, 0)[None], grid, padding_mode="border", align_corners=False
    )
    return sampled[0, :, 0].T


def _like(array: Array, values: tuple[float, float]) -> Array:
    if isinstance(array, Tensor):
        return _constant(values, array.dtype, array.device)
    return np.asarray(values, dtype=np.asarray(array).dtype)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, since to copy it to a device would be to wait for the device."""
    with torch.inference_mode(False):  # such a tensor could not be used in training any more
        return torch.tensor(values, dtype=dtype, device=device)
