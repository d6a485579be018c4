"""Which flow explains a pixel best, judged inside its own object. Pure functions of two images.

Flow that was smoothed leaks across motion borders, by a few pixels here and many there, and the
leak closes its cycles as well as the truth does. What gives it away is the picture: the pixels of
like colour around a point do not look alike under it. So every pixel may take over the flow of
others, judged by a cost that is averaged along edges instead of across them.
"""

from collections.abc import Sequence
from copy import copy

import cv2
import numpy as np

from preprocess.warp import sample

__all__ = ["PhotoConsistency", "difference", "features"]

_RADIUS = 3  # pixels of the window, taken twice
_SOFTNESS = 25.0  # grey levels squared: weaker edges do not divide
_CAPS = 24.0, 8.0  # of colour and gradient, grey levels: more is an occlusion or a highlight
_COLOR_SHARE = 0.5  # colour changes with the light, gradients hardly do
_REACHES = (12, 6, 3)  # pixels from which flow is taken over, in turn


class PhotoConsistency:
    """Cost of any flow between two images.

    Sources: Hosni et al., Fast Cost-Volume Filtering for Visual Correspondence and Beyond, TPAMI
    2013 (cost, guided filter); Lu et al., PatchMatch Filter, CVPR 2013 (taking over flow).

    Args:
        image1: source, `(h, w, 3)` uint8 RGB.
        image2: target, likewise.
    """

    def __init__(self, image1: np.ndarray, image2: np.ndarray):
        self._source, self._target = features(image1), features(image2)
        self._guide = self._source[..., 0].astype(np.float32)
        self._look_through(_RADIUS)

    def narrowed(self, radius: int) -> "PhotoConsistency":
        """The same images judged in windows of another `radius` (pixels).

        A wide window judges safely, a narrow one sees wires and spokes.
        """
        other = copy(self)
        other._look_through(radius)
        return other

    def _look_through(self, radius):
        self._box = (2 * radius + 1,) * 2
        self._mean = self._window(self._guide)
        self._variance = self._window(self._guide**2) - self._mean**2 + _SOFTNESS

    def cost(self, flow: np.ndarray) -> np.ndarray:
        """`(h, w)` grey levels by which the surroundings of a pixel differ under its flow.

        The average is a guided filter with the source as its guide (He et al., TPAMI 2013).
        """
        cost = difference(self._source, sample(self._target, flow))
        mean = self._window(cost)
        slope = (self._window(cost * self._guide) - self._mean * mean) / self._variance
        return self._window(slope) * self._guide + self._window(mean - slope * self._mean)

    def _window(self, values):
        return cv2.blur(values, self._box)

    def choose(self, flows: Sequence[np.ndarray], handicaps: Sequence[float]) -> np.ndarray:
        """Per pixel the flow `(h, w, 2)` of least cost; the first of equals.

        Args:
            flows: candidates, `(h, w, 2)` pixels each.
            handicaps: grey levels added to the cost of each.
        """
        costs = [self.cost(flow) + extra for flow, extra in zip(flows, handicaps, strict=True)]
        return np.choose(np.argmin(costs, axis=0)[..., None], flows)

    def spread(self, flow: np.ndarray, handicap: float = 0.2) -> np.ndarray:
        """`flow` `(h, w, 2)`, where a pixel up to 21 away has a better one replaced by that.

        Better means by `handicap` grey levels.
        """
        least = self.cost(flow) - handicap
        for reach in _REACHES:
            for other in _neighbours(flow, reach):
                cost = self.cost(other)
                flow = np.where((cost < least)[..., None], other, flow)
                least = np.minimum(cost, least)
        return flow


_PAIRS = np.float32([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])  # channels of colour, of gradient


def features(image: np.ndarray) -> np.ndarray:
    """Grey, red minus blue and the two gradients, `(h, w, 4)` uint8: bytes are fast to sample."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    slopes = (cv2.Sobel(gray, cv2.CV_16S, *axes, ksize=3) // 4 for axes in ((1, 0), (0, 1)))
    red, _, blue = cv2.split(image.astype(np.int16))
    signed = [(red - blue) // 2, *slopes]
    return cv2.merge([gray, *(np.clip(v + 128, 0, 255).astype(np.uint8) for v in signed)])


def difference(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`(h, w)` float32 grey levels between two `(h, w, 4)` `features`, pixel by pixel, capped."""
    both = cv2.transform(cv2.absdiff(source, target).astype(np.float32), _PAIRS)
    color, gradient = cv2.split(both)
    return _COLOR_SHARE * np.minimum(color, _CAPS[0]) + np.minimum(gradient, _CAPS[1])


def _neighbours(flow, reach):
    """`flow` as seen by pixels `reach` to the left, right, above and below."""
    height, width = flow.shape[:2]
    wide = cv2.copyMakeBorder(flow, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        yield wide[(1 + dy) * reach :, (1 + dx) * reach :][:height, :width]
