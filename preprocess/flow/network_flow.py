"""What flow providers by a network share: frames encoded once, and batches that memory holds."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from omni.system import out_of_memory
from preprocess.flow.provider import ImagePair

__all__ = ["NetworkFlow", "frame_digest"]

logger = logging.getLogger(__name__)

MOST_PAIRS = 8
"""Pairs that are computed at once where memory allows."""

Result = TypeVar("Result")


class NetworkFlow:
    """Part of a `FlowProvider` whose network encodes each frame on its own.

    Args:
        network: with `encode`, from a batch of frames to two tensors of features.
        device: torch device; half precision and batches on CUDA.
        method: its name, for people.
        cached_frames: frames whose features are kept for the pairs to come.
    """

    workers = 1

    def __init__(self, network: Any, device: str, method: str, cached_frames: int):
        self._network, self._device = network.to(device).eval(), torch.device(device)
        self._method, self._cached_frames = method, cached_frames
        self._encoded: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._most = MOST_PAIRS
        self.batch = self._most if self._device.type == "cuda" else 1

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, flow_init: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow from `image1` to `image2`.

        Args:
            image1: source frame, `(h, w, 3)` uint8 RGB.
            image2: target frame, `(h, w, 3)` uint8 RGB.
            flow_init: `(h, w, 2)` initial flow in pixels, None for zero.

        Returns:
            `(h, w, 2)` float32 pixels.
        """
        return self.estimate_batch([(image1, image2, flow_init)])[0]

    def estimate_batch(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        """Flow `(h, w, 2)` of several pairs of one size, as many at once as memory holds."""
        raise NotImplementedError

    def _attempt(self, compute: Callable[[], Result], count: int) -> Result | None:
        """What is computed from `count` pairs; None if memory ran out and some was freed."""
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (count == 1 and len(self._encoded) <= 2):
                raise
        # Outside the handler, where the error no longer holds on to the tensors.
        self._encoded.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if count > 1:
            self._most = count // 2
            logger.warning(
                "out of memory: continuing with %s batches of %d pairs", self._method, self._most
            )
        return None

    def _stack(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features of several frames as those of one batch."""
        first, second = zip(*map(self._encode, images), strict=True)
        return torch.cat(first), torch.cat(second)

    def _encode(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features of one frame. Alone, so that they do not depend on the batch."""
        key = frame_digest(image)
        if key not in self._encoded:
            batch = torch.from_numpy(image).to(self._device).movedim(-1, 0)[None].float()
            batch = self._prepared(batch)
            with self._half():
                first, second = self._network.encode(batch)
            self._encoded[key] = first.float(), second.float()
        self._encoded.move_to_end(key)
        while len(self._encoded) > self._cached_frames:
            self._encoded.popitem(last=False)
        return self._encoded[key]

    def _prepared(self, batch: Tensor) -> Tensor:
        """Frames `(1, 3, h, w)` in 0 to 255 as the network's `encode` takes them."""
        raise NotImplementedError

    def _half(self) -> torch.autocast:
        """Half precision, on CUDA devices only."""
        return torch.autocast(self._device.type, torch.float16, self._device.type == "cuda")


def frame_digest(image: np.ndarray) -> bytes:
    """Identifies a frame by its pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
