"""Block matching: every displacement within reach is tried. A pure function of two images.

A search from coarse to fine loses what moves by more than its own size: at the scale at which the
motion is small, a small object is no longer there. Here it is found where it is, to within a
pixel of a smaller image, and whoever refines flow may start from it.
"""

import cv2
import numpy as np

from preprocess.photoconsistency import difference, features

__all__ = ["block_match"]

_SHORT_SIDE = 128  # pixels of the image in which blocks are matched, about
_REACH = 16  # pixels there
_BLOCK = 7  # pixels there

_STEPS = np.stack(np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1][::-1], -1).reshape(-1, 2)
_DISPLACEMENTS = _STEPS[np.argsort((_STEPS**2).sum(-1), kind="stable")]
"""Of equally good ones, as where there is no texture, the shortest shall win."""


def block_match(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """Flow `(h, w, 2)` float32 pixels, up to about an eighth of the short side along each axis.

    Args:
        image1: source, `(h, w, 3)` uint8 RGB, 2 pixels wide and high at least.
        image2: target, likewise.
    """
    size = image1.shape[1::-1]
    factor = max(1, round(min(size) / _SHORT_SIDE))
    level = tuple(-(-side // factor) for side in size)
    small = (cv2.resize(image, level, interpolation=cv2.INTER_AREA) for image in (image1, image2))
    source, target = map(features, small)
    width, height = level
    wide = cv2.copyMakeBorder(target, *[_REACH] * 4, cv2.BORDER_REPLICATE)
    least = np.full((height, width), np.inf, np.float32)
    chosen = np.zeros((height, width), np.int32)
    for number, (dx, dy) in enumerate(_DISPLACEMENTS + _REACH):
        unlike = difference(source, wide[dy : dy + height, dx : dx + width])
        cost = cv2.blur(unlike, (_BLOCK, _BLOCK))
        better = cost < least
        np.copyto(least, cost, where=better)
        np.copyto(chosen, number, where=better)
    flow = _DISPLACEMENTS[chosen].astype(np.float32) * (np.array(size) / level).astype(np.float32)
    return cv2.resize(flow, size, interpolation=cv2.INTER_NEAREST)
