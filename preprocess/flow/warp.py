"""Warping and composition of flows: pure functions on arrays.

Flows are `(h, w, 2)` float32 `(dx, dy)` in pixels of the processing resolution, from a source to
a target frame. Displacements need no half-pixel; array index + flow is the target's array index.
"""

from functools import lru_cache

import cv2
import numpy as np

__all__ = ["compose", "sample"]


def sample(
    image: np.ndarray, flow: np.ndarray, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """`image` `(h, w[, C])` at the targets of `flow`; outside, its border pixels are repeated."""
    # OpenCV takes None, against its stubs.
    return cv2.remap(  # type: ignore[call-overload]
        image, flow + _grid(flow.shape[:2]), None, interpolation, borderMode=cv2.BORDER_REPLICATE
    )


def compose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Flow a -> c from a -> b (`first`) and b -> c (`second`), bilinear at the targets of `first`.

    A point that leaves the frame in b is extrapolated with the motion of the nearest border pixel.
    """
    return first + sample(second, first)


@lru_cache(2)
def _grid(size: tuple[int, int]) -> np.ndarray:
    """Array columns and rows of the pixels of an image of `size` (h, w), `(h, w, 2)` float32."""
    rows, columns = np.indices(size, np.float32)
    pixels = np.stack([columns, rows], axis=-1)
    pixels.setflags(write=False)
    return pixels
