"""The interface of every flow method.

The methods themselves are `preprocess.flow.dis`, `preprocess.flow.raft` and
`preprocess.flow.gmflow`; other packages may offer more (see `preprocess.flow.registry`).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["FlowProvider", "ImagePair"]

ImagePair = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Source and target image `(h, w, 3)` uint8 RGB, and the initial flow `(h, w, 2)` or None."""


class FlowProvider(Protocol):
    """Anything that maps two images to a dense flow.

    Attributes:
        name: identifies the method, its settings and its weights.
        workers: how many `estimate` or `estimate_batch` calls may run at the same time.
        batch: how many pairs `estimate_batch` is best given at once.
    """

    name: str
    workers: int
    batch: int

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, flow_init: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels between two `(h, w, 3)` uint8 RGB images.

        `flow_init` is an initial flow in pixels, None for adjacent frames. The result depends on
        the arguments alone.
        """
        ...

    def estimate_batch(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        """Flow of each `(image1, image2, flow_init)`, all of one size, as by `estimate`."""
        ...
