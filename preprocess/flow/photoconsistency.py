"""Photo consistency: which flow explains a pixel best, evaluated inside its own object.

Smoothed flow leaks across motion borders, by a few pixels here and many there, and leaked flow is
as cycle consistent as the true one. Only the images reveal it: warped by leaked flow, the pixels
of similar colour around a point do not match. So every pixel may take over the flow of others, by
a matching cost that is averaged along image edges instead of across them. Pure functions of two
images.
"""

from collections.abc import Iterator, Sequence
from copy import copy

import cv2
import numpy as np

from preprocess.flow.frame import Frame, features
from preprocess.flow.warp import sample

__all__ = ["QUARTER", "PhotoConsistency", "mismatch"]

_RADIUS = 3  # pixels of the window, applied twice
_CAPS = 24, 8  # of colour and gradient, grey levels: more is an occlusion or a highlight
_REACHES = (12, 6, 3)  # pixels from which flow is taken over, in turn

QUARTER = np.float32(0.25)
"""Grey levels in which `mismatch` counts."""


class PhotoConsistency:
    """Cost of any flow between two images.

    Sources: Hosni et al., Fast Cost-Volume Filtering for Visual Correspondence and Beyond, TPAMI
    2013 (cost, guided filter); Lu et al., PatchMatch Filter, CVPR 2013 (propagation).

    Args:
        source: the frame that flow starts from.
        target: the frame that it leads to, of the same size.
    """

    def __init__(self, source: Frame, target: Frame):
        self._frame = source
        self._source, self._target = features(source.image), features(target.image)
        self._set_radius(_RADIUS)

    def with_radius(self, radius: int) -> "PhotoConsistency":
        """The same images compared in windows of another `radius` (pixels).

        Wide windows are robust, narrow ones resolve structures as thin as wires and spokes.
        """
        other = copy(self)
        other._set_radius(radius)
        return other

    def _set_radius(self, radius: int) -> None:
        self._box = (2 * radius + 1, 2 * radius + 1)
        self._guide, self._mean, self._variance = self._frame.guide(radius)

    def cost(self, flow: np.ndarray) -> np.ndarray:
        """`(h, w)` grey levels by which the surroundings of a pixel differ under its flow.

        The average is a guided filter with the source as its guide (He et al., TPAMI 2013).

        Args:
            flow: `(h, w, 2)` pixels, source to target.
        """
        apart = cv2.absdiff(self._source, sample(self._target, flow))
        cost = mismatch(cv2.split(apart)) * QUARTER
        mean = self._box_mean(cost)
        cost *= self._guide
        slope = self._box_mean(cost)
        slope -= np.multiply(self._mean, mean, out=cost)
        slope /= self._variance
        mean -= np.multiply(slope, self._mean, out=cost)
        average = self._box_mean(slope)
        average *= self._guide
        average += self._box_mean(mean)
        return average

    def _box_mean(self, values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, self._box)

    def choose(self, flows: Sequence[np.ndarray], penalties: Sequence[float]) -> np.ndarray:
        """Per pixel the flow `(h, w, 2)` of least cost; the first of equals.

        Args:
            flows: candidates, `(h, w, 2)` float32 pixels each.
            penalties: grey levels added to the cost of each.
        """
        chosen = flows[0].copy()
        least = self.cost(flows[0]) + penalties[0]
        for flow, extra in zip(flows[1:], penalties[1:], strict=True):
            _replace(chosen, least, flow, self.cost(flow) + extra)
        return chosen

    def propagate(self, flow: np.ndarray, margin: float = 0.2) -> np.ndarray:
        """`flow` with better flow of neighbours taken over, from up to 21 pixels away.

        Args:
            flow: `(h, w, 2)` float32 pixels.
            margin: grey levels by which the cost of a neighbour's flow must be lower.

        Returns:
            `(h, w, 2)` pixels.
        """
        flow = flow.copy()
        least = self.cost(flow) - margin
        for reach in _REACHES:
            for other in _neighbours(flow, reach):
                _replace(flow, least, other, self.cost(other))
        return flow


def mismatch(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Difference of two pixels in colour and gradient, capped, in `QUARTER`s of a grey level.

    Half the mean of the colours, for they change with the light, and the mean of the gradients.
    Sums of bytes are exact: a sum that exceeds 255 exceeds the caps.

    Args:
        differences: absolute ones of the four channels of `features`, uint8 of any shape.
    """
    gray, chroma, across, down = differences
    color = _capped(cv2.add(gray, chroma), 2 * _CAPS[0])
    gradient = _capped(cv2.add(across, down), 2 * _CAPS[1])
    return cv2.add(cv2.add(color, gradient), gradient)


def _capped(values: np.ndarray, cap: int) -> np.ndarray:
    return cv2.threshold(values, cap, 0, cv2.THRESH_TRUNC, values)[1]


def _replace(flow: np.ndarray, least: np.ndarray, other: np.ndarray, cost: np.ndarray) -> None:
    """Overwrite `flow` and its cost `least` where the `cost` of the `other` flow is lower."""
    cv2.copyTo(other, (cost < least).view(np.uint8), flow)
    np.minimum(cost, least, out=least)


def _neighbours(flow: np.ndarray, reach: int) -> Iterator[np.ndarray]:
    """`flow` of the pixels `reach` to the left, right, above and below each pixel."""
    height, width = flow.shape[:2]
    padded = cv2.copyMakeBorder(flow, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        yield padded[(1 + dy) * reach :, (1 + dx) * reach :][:height, :width]
