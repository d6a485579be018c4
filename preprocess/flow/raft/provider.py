"""RAFT as a flow provider: each frame is encoded once, pairs are computed in batches.

Implements the interface `preprocess.flow.provider.FlowProvider`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.errors import OmniError
from preprocess.flow.network_flow import NetworkFlow
from preprocess.flow.provider import ImagePair
from preprocess.flow.raft.network import SMALLEST_SIDE, FlowNetwork
from preprocess.flow.weights import Weights, read_weights

__all__ = ["RaftFlow"]

_UPDATES = 20  # the original's number
_CACHED_FRAMES = 80  # a gap-32 level alternates between frames 32 apart
_CORRELATIONS = 2**28  # at once: 1.4 GB with their pyramid; 6 pairs at 480x854


class RaftFlow(NetworkFlow):
    """Flow by recurrent all-pairs field transforms (a `FlowProvider`).

    Args:
        weights: which ones.
        device: torch device; half precision and batches on CUDA.

    Raises:
        OmniError: the weights are missing, unreadable or of another network.
    """

    def __init__(self, weights: Weights, device: str = "cpu"):
        self.name, variant = weights.name, weights.network.removeprefix("raft-")
        try:
            network = FlowNetwork(read_weights(weights.path), variant)
        except Exception as error:  # a torn file raises whatever its reader meets first
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OmniError(
                f"{weights.path} does not hold RAFT-{variant} weights ({reason}): give "
                "another file as flow.weights, the other kind as flow.raft, or use "
                "flow.provider=dis"
            ) from None
        super().__init__(network, device, "RAFT", _CACHED_FRAMES)

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
            flows += self._attempt(partial(self._estimate, chunk), len(chunk)) or []
        return flows

    def _room(self, size: tuple[int, int]) -> int:
        """Pairs of images of `size` that are computed at once."""
        right, bottom = _padding(size)[1::2]
        cells = (size[0] + bottom) * (size[1] + right) // 64
        return max(1, min(self._most, _CORRELATIONS // cells**2))

    @torch.inference_mode()
    def _estimate(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        height, width = pairs[0][0].shape[:2]
        features1, context = self._stack([pair[0] for pair in pairs])
        features2, _ = self._stack([pair[1] for pair in pairs])
        flow_init = torch.cat([self._coarse(pair[2], context) for pair in pairs])
        with self._half():
            flow = self._network(features1, features2, context, flow_init, _UPDATES)
        flow = flow[..., :height, :width].movedim(1, -1).float()
        return list(np.ascontiguousarray(flow.cpu().numpy()))

    def _prepared(self, batch: Tensor) -> Tensor:
        padding = _padding((batch.shape[2], batch.shape[3]))
        return F.pad(batch / 127.5 - 1, padding, mode="replicate")

    def _coarse(self, flow_init: np.ndarray | None, context: Tensor) -> Tensor:
        """(1, 2, h, w) initial flow at feature resolution and in its pixels."""
        if flow_init is None:
            return torch.zeros_like(context[:1, :2])
        dense = torch.from_numpy(flow_init).to(self._device).movedim(-1, 0)[None]
        padding = _padding((flow_init.shape[0], flow_init.shape[1]))
        return F.avg_pool2d(F.pad(dense, padding, mode="replicate"), 8) / 8


def _padding(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Right and bottom padding (torch order) to multiples of 8 and to the smallest side."""
    bottom, right = (max(SMALLEST_SIDE, -(-side // 8) * 8) - side for side in size)
    return 0, right, 0, bottom
