"""What a flow provider says about one pair of images."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Motion"]


@dataclass(frozen=True)
class Motion:
    """Flow from one image to another and, from providers that judge themselves, how good it is.

    flow: (h, w, 2) float32 pixels.
    hidden: (h, w) probability that the point is hidden in the second image, or None.
    sigma: (h, w) standard deviation of the flow per axis in pixels, or None.
    """

    flow: np.ndarray
    hidden: np.ndarray | None = None
    sigma: np.ndarray | None = None
