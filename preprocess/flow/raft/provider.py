"""RAFT as a flow provider: each frame is encoded once, pairs are computed in batches.

Implements the interface `preprocess.flow.provider.FlowProvider`.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.errors import OmniError
from omni.system import out_of_memory
from preprocess.flow.provider import ImagePair
from preprocess.flow.raft.network import SMALLEST_SIDE, FlowNetwork
from preprocess.flow.weights import Weights, read_weights

__all__ = ["RaftFlow"]

logger = logging.getLogger(__name__)

_UPDATES = 20  # the original's number
_CACHED_FRAMES = 80  # a gap-32 level alternates between frames 32 apart
_MOST_PAIRS = 8
_CORRELATIONS = 2**28  # at once: 1.4 GB with their pyramid; 6 pairs at 480x854


class RaftFlow:
    """Flow by recurrent all-pairs field transforms (a `FlowProvider`).

    Args:
        weights: which ones.
        device: torch device; half precision and batches on CUDA.

    Raises:
        OmniError: the weights are missing, unreadable or of another network.
    """

    workers = 1

    def __init__(self, weights: Weights, device: str = "cpu"):
        self.name, variant = weights.name, weights.network.removeprefix("raft-")
        try:
            self._network = FlowNetwork(read_weights(weights.path), variant)
        except Exception as error:  # a torn file raises whatever its reader meets first
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OmniError(
                f"{weights.path} does not hold RAFT-{variant} weights ({reason}): give "
                "another file as flow.weights, the other kind as flow.raft, or use "
                "flow.provider=dis"
            ) from None
        self._network.to(device).eval()
        self._device = torch.device(device)
        self._encoded: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._most = _MOST_PAIRS
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
        """Flow of several pairs of one size, as many at once as memory holds.

        Args:
            pairs: each `(image1, image2, flow_init)`, as `estimate` takes them.

        Returns:
            Flow `(h, w, 2)` float32 pixels of each pair.
        """
        flows: list[np.ndarray] = []
        while len(flows) < len(pairs):
            chunk = pairs[len(flows) :][: self._room(pairs[0][0].shape[:2])]
            found = self._attempt(chunk)
            if found is None:
                self._free(len(chunk))
            else:
                flows += found
        return flows

    def _room(self, size: tuple[int, int]) -> int:
        """Pairs of images of `size` that are computed at once."""
        right, bottom = _padding(size)[1::2]
        cells = (size[0] + bottom) * (size[1] + right) // 64
        return max(1, min(self._most, _CORRELATIONS // cells**2))

    def _attempt(self, pairs: Sequence[ImagePair]) -> list[np.ndarray] | None:
        """Flow of the pairs; None if memory ran out and some can be freed."""
        try:
            return self._estimate(pairs)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (len(pairs) == 1 and len(self._encoded) <= 2):
                raise
        return None  # outside the handler, where the error no longer holds on to the tensors

    def _free(self, failed: int) -> None:
        """Drop cached frames, and halve batches of the size that `failed`."""
        self._encoded.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if failed > 1:
            self._most = failed // 2
            logger.warning("out of memory: continuing with RAFT batches of %d pairs", self._most)

    @torch.inference_mode()
    def _estimate(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        height, width = pairs[0][0].shape[:2]
        features1, context = self._stack(pair[0] for pair in pairs)
        features2, _ = self._stack(pair[1] for pair in pairs)
        flow_init = torch.cat([self._coarse(pair[2], context) for pair in pairs])
        with self._half():
            flow = self._network(features1, features2, context, flow_init, _UPDATES)
        flow = flow[..., :height, :width].movedim(1, -1).float()
        return list(np.ascontiguousarray(flow.cpu().numpy()))

    def _stack(self, images: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
        features, context = zip(*map(self._encode, images), strict=True)
        return torch.cat(features), torch.cat(context)

    def _encode(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features and context of one frame. Alone, so that they do not depend on the batch."""
        key = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        if key not in self._encoded:
            batch = torch.from_numpy(image).to(self._device).movedim(-1, 0)[None].float()
            padding = _padding((image.shape[0], image.shape[1]))
            batch = F.pad(batch / 127.5 - 1, padding, mode="replicate")
            with self._half():
                features, context = self._network.encode(batch)
            self._encoded[key] = features.float(), context.float()
        self._encoded.move_to_end(key)
        while len(self._encoded) > _CACHED_FRAMES:
            self._encoded.popitem(last=False)
        return self._encoded[key]

    def _coarse(self, flow_init: np.ndarray | None, context: Tensor) -> Tensor:
        """(1, 2, h, w) initial flow at feature resolution and in its pixels."""
        if flow_init is None:
            return torch.zeros_like(context[:1, :2])
        dense = torch.from_numpy(flow_init).to(self._device).movedim(-1, 0)[None]
        padding = _padding((flow_init.shape[0], flow_init.shape[1]))
        return F.avg_pool2d(F.pad(dense, padding, mode="replicate"), 8) / 8

    def _half(self) -> torch.autocast:
        """Half precision, on CUDA devices only."""
        return torch.autocast(self._device.type, torch.float16, self._device.type == "cuda")


def _padding(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Right and bottom padding (torch order) to multiples of 8 and to the smallest side."""
    bottom, right = (max(SMALLEST_SIDE, -(-side // 8) * 8) - side for side in size)
    return 0, right, 0, bottom
