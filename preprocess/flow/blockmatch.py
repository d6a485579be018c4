"""Block matching: every displacement within reach is tried. A pure function of two images.

A search from coarse to fine loses whatever moves by more than its own size: at the scale at which
the motion is small, a small object has vanished. Block matching finds it where it is, to within a
pixel of a smaller image, and variational refinement may start from there.
"""

import cv2
import numpy as np

from preprocess.flow.frame import features
from preprocess.flow.photoconsistency import mismatch

__all__ = ["block_match"]

_SHORT_SIDE = 128  # pixels of the image in which blocks are matched, about
_REACH = 16  # pixels there
_BLOCK = 7  # pixels there

_NUMBERS = 2048.0  # a power of two above the number of displacements

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
    level = -(-size[0] // factor), -(-size[1] // factor)
    small = (cv2.resize(image, level, interpolation=cv2.INTER_AREA) for image in (image1, image2))
    chosen = _best(*map(features, small))
    flow = _DISPLACEMENTS[chosen].astype(np.float32) * (np.array(size) / level).astype(np.float32)
    return cv2.resize(flow, size, interpolation=cv2.INTER_NEAREST)


def _best(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Number `(h, w)` of the displacement under which blocks of two `features` differ least.

    The channels lie below each other with `2 _REACH` rows between them, so that one call compares
    all four. A block's sum is an integer below 2^12, and a displacement's number adds less than
    one in steps of 2^-11, which float32 holds exactly: the least of these sums is the first of
    equals, and its fraction is its number.
    """
    height, width = source.shape[:2]
    pitch = height + 2 * _REACH
    still = _stacked(source, 0, 2 * _REACH, 0)
    moving = _stacked(target, _REACH, _REACH, _REACH)
    rows = len(still) - 2 * _REACH
    still = still[:rows]
    least = np.full((height, width), np.inf, np.float32)
    for number, (dx, dy) in enumerate((_DISPLACEMENTS + _REACH).tolist()):
        apart = cv2.absdiff(still, moving[dy : dy + rows, dx : dx + width])
        parts = [apart[top : top + height] for top in range(0, rows, pitch)]
        sums = cv2.boxFilter(mismatch(parts), cv2.CV_32F, (_BLOCK, _BLOCK), normalize=False)
        np.minimum(np.add(sums, number / _NUMBERS, out=sums), least, out=least)
    return (np.modf(least)[0] * _NUMBERS).astype(np.int32)


def _stacked(image: np.ndarray, above: int, below: int, beside: int) -> np.ndarray:
    """The channels of an image below each other, each with its border pixels repeated around."""
    margins = above, below, beside, beside
    channels = cv2.split(image)
    return cv2.vconcat([cv2.copyMakeBorder(c, *margins, cv2.BORDER_REPLICATE) for c in channels])
