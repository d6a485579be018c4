"""What the parts of a flow need of one frame, computed once: features, smoothed images, windows."""

import cv2
import numpy as np

__all__ = ["Frame", "features"]

Size = tuple[int, int]

_SOFTNESS = 25.0  # grey levels squared: weaker edges do not separate in a guided filter
_BLUR = 0.6  # pixels, standard deviation before variational refinement


class Frame:
    """An image and its parts that several steps of one flow share, computed on first use.

    It is not kept from one pair to the next: that saves less than a hundredth of the time.

    Args:
        image: `(h, w, 3)` uint8 RGB, which must not change afterwards.
    """

    def __init__(self, image: np.ndarray):
        self.image = image
        self.gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        self.size = self.gray.shape[1], self.gray.shape[0]
        self._guide = self.gray.astype(np.float32)
        self._smooth: dict[Size, np.ndarray] = {}

    def smooth(self, size: Size) -> np.ndarray:
        """The smoothed grey image in [0, 1], float32, at `size` (w, h)."""
        if self.size not in self._smooth:
            self._smooth[self.size] = cv2.GaussianBlur(self._guide / 255, (0, 0), _BLUR)
        if size not in self._smooth:
            level = cv2.resize(self._smooth[self.size], size, interpolation=cv2.INTER_AREA)
            self._smooth[size] = level
        return self._smooth[size]

    def guide(self, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Grey levels, and their mean and softened variance in windows of `radius` (pixels).

        All `(h, w)` float32, as guided filters need them (He et al., TPAMI 2013).
        """
        box = 2 * radius + 1, 2 * radius + 1
        mean = cv2.blur(self._guide, box)
        return self._guide, mean, cv2.blur(self._guide**2, box) - mean**2 + _SOFTNESS


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
