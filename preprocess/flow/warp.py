"""Warping and composition of flows: pure functions on arrays.

Flows are `(h, w, 2)` float32 `(dx, dy)` in pixels of the processing resolution, from a source to
a target frame. Displacements need no half-pixel; array index + flow is the target's array index.
"""

import cv2
import numpy as np

__all__ = ["compose", "landing", "sample"]


def landing(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Array columns and rows, each `(h, w)` float32, at which the pixels of a flow land."""
    height, width = flow.shape[:2]
    columns = flow[..., 0] + np.arange(width, dtype=np.float32)
    rows = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return columns, rows


def sample(
    image: np.ndarray, flow: np.ndarray, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """`image` `(h, w[, C])` at the targets of `flow`; outside, its border pixels are repeated."""
    columns, rows = landing(flow)
    return cv2.remap(image, columns, rows, interpolation, borderMode=cv2.BORDER_REPLICATE)


def compose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Flow a -> c from a -> b (`first`) and b -> c (`second`), bilinear at the targets of `first`.

    A point that leaves the frame in b is extrapolated with the motion of the nearest border pixel.
    """
    return first + sample(second, first)
