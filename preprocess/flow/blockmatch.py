"""Block matching: every displacement within reach is tried. A pure function of two images.

A search from coarse to fine loses whatever moves by more than its own size: at the scale at which
the motion is small, a small object has vanished. Block matching finds it where it is, to within a
pixel of a smaller image, and variational refinement may start from there.
"""

import cv2
import numpy as np

from preprocess.flow.photoconsistency import difference, features

__all__ = ["block_match"]

_SHORT_SIDE = 128  # pixels of the image in which blocks are matched, about
_REACH = 16  # pixels there
_BLOCK = 7  # pixels there

_OFFSETS = np.moveaxis(np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1][::-1], 0, -1)
_STEPS = _OFFSETS.reshape(-1, 2)
_DISPLACEMENTS = _STEPS[np.argsort((_STEPS**2).sum(-1), kind="stable")]
"""Shortest first: of equally good ones, as where there is no texture, the shortest is chosen."""


def block_match(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """Flow `(h, w, 2)` float32 pixels, up to about an eighth of the short side along each axis.

    Args:
        image1: source, `(h, w, 3)` uint8 RGB, 2 pixels wide and high at least.
        image2: target, likewise.
    """
    size = image1.shape[1], image1.shape[0]
    factor = max(1, round(min(size) / _SHORT_SIDE))
    width, height = level = -(-size[0] // factor), -(-size[1] // factor)
    small = (cv2.resize(image, level, interpolation=cv2.INTER_AREA) for image in (image1, image2))
    source, target = map(features, small)
    padded = cv2.copyMakeBorder(target, _REACH, _REACH, _REACH, _REACH, cv2.BORDER_REPLICATE)
    least = np.full((height, width), np.inf, np.float32)
    chosen = np.zeros((height, width), np.int32)
    for number, (dx, dy) in enumerate(_DISPLACEMENTS + _REACH):
        mismatch = difference(source, padded[dy : dy + height, dx : dx + width])
        cost = cv2.blur(mismatch, (_BLOCK, _BLOCK))
        better = cost < least
        np.copyto(least, cost, where=better)
        np.copyto(chosen, number, where=better)
    flow = _DISPLACEMENTS[chosen].astype(np.float32) * (np.array(size) / level).astype(np.float32)
    return cv2.resize(flow, size, interpolation=cv2.INTER_NEAREST)
