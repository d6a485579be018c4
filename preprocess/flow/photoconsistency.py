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

from preprocess.flow.warp import sample

__all__ = ["PhotoConsistency", "difference", "features"]

_RADIUS = 3  # pixels of the window, applied twice
_SOFTNESS = 25.0  # grey levels squared: weaker edges do not separate
_CAPS = 24.0, 8.0  # of colour and gradient, grey levels: more is an occlusion or a highlight
_COLOR_SHARE = 0.5  # colour changes with the light, gradients hardly do
_REACHES = (12, 6, 3)  # pixels from which flow is taken over, in turn


class PhotoConsistency:
    """Cost of any flow between two images.

    Sources: Hosni et al., Fast Cost-Volume Filtering for Visual Correspondence and Beyond, TPAMI
    2013 (cost, guided filter); Lu et al., PatchMatch Filter, CVPR 2013 (propagation).

    Args:
        image1: source, `(h, w, 3)` uint8 RGB.
        image2: target, likewise.
    """

    def __init__(self, image1: np.ndarray, image2: np.ndarray):
        self._source, self._target = features(image1), features(image2)
        self._guide = self._source[..., 0].astype(np.float32)
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
        self._mean = self._box_mean(self._guide)
        self._variance = self._box_mean(self._guide**2) - self._mean**2 + _SOFTNESS

    def cost(self, flow: np.ndarray) -> np.ndarray:
        """`(h, w)` grey levels by which the surroundings of a pixel differ under its flow.

        The average is a guided filter with the source as its guide (He et al., TPAMI 2013).

        Args:
            flow: `(h, w, 2)` pixels, source to target.
        """
        cost = difference(self._source, sample(self._target, flow))
        mean = self._box_mean(cost)
        slope = (self._box_mean(cost * self._guide) - self._mean * mean) / self._variance
        return self._box_mean(slope) * self._guide + self._box_mean(mean - slope * self._mean)

    def _box_mean(self, values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, self._box)

    def choose(self, flows: Sequence[np.ndarray], penalties: Sequence[float]) -> np.ndarray:
        """Per pixel the flow `(h, w, 2)` of least cost; the first of equals.

        Args:
            flows: candidates, `(h, w, 2)` pixels each.
            penalties: grey levels added to the cost of each.
        """
        costs = [self.cost(flow) + extra for flow, extra in zip(flows, penalties, strict=True)]
        return np.choose(np.argmin(costs, axis=0)[..., None], flows)

    def propagate(self, flow: np.ndarray, margin: float = 0.2) -> np.ndarray:
        """`flow` with better flow of neighbours taken over, from up to 21 pixels away.

        Args:
            flow: `(h, w, 2)` pixels.
            margin: grey levels by which the cost of a neighbour's flow must be lower.

        Returns:
            `(h, w, 2)` pixels.
        """
        least = self.cost(flow) - margin
        for reach in _REACHES:
            for other in _neighbours(flow, reach):
                cost = self.cost(other)
                flow = np.where((cost < least)[..., None], other, flow)
                least = np.minimum(cost, least)
        return flow


# Channels that are summed to colour and to gradient.
_GROUPS = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], np.float32)


def features(image: np.ndarray) -> np.ndarray:
    """Grey, red minus blue and the two gradients, `(h, w, 4)` uint8: bytes are fast to sample.

    Args:
        image: `(h, w, 3)` uint8 RGB.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    slopes = (cv2.Sobel(gray, cv2.CV_16S, *axes, ksize=3) // 4 for axes in ((1, 0), (0, 1)))
    red, _, blue = cv2.split(image.astype(np.int16))
    signed = [(red - blue) // 2, *slopes]
    return cv2.merge([gray, *(np.clip(v + 128, 0, 255).astype(np.uint8) for v in signed)])


def difference(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`(h, w)` float32 grey levels between two `(h, w, 4)` `features`, pixel by pixel, capped."""
    both = cv2.transform(cv2.absdiff(source, target).astype(np.float32), _GROUPS)
    color, gradient = cv2.split(both)
    return _COLOR_SHARE * np.minimum(color, _CAPS[0]) + np.minimum(gradient, _CAPS[1])


def _neighbours(flow: np.ndarray, reach: int) -> Iterator[np.ndarray]:
    """`flow` of the pixels `reach` to the left, right, above and below each pixel."""
    height, width = flow.shape[:2]
    padded = cv2.copyMakeBorder(flow, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        yield padded[(1 + dy) * reach :, (1 + dx) * reach :][:height, :width]
