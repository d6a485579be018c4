"""GMFlow as a flow provider: frames are encoded once, pairs matched once for both directions.

Implements the interface `preprocess.flow.provider.FlowProvider`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.errors import OmniError
from preprocess.flow.gmflow.network import MULTIPLE, GMFlow
from preprocess.flow.network_flow import NetworkFlow, frame_digest
from preprocess.flow.provider import ImagePair
from preprocess.flow.weights import Weights, read_weights

__all__ = ["GmFlow"]

SHORT_SIDE, LARGEST_FACTOR = 512, 2
"""Frames are enlarged to this short side in pixels, at most by this factor: flow of small frames is
off by up to 1.4 px, of frames enlarged twice it is not (docs/experiments/flow.md)."""

CACHED_FRAMES, CACHED_FLOWS = 40, 80
"""Kept for the pairs to come: a gap-32 level alternates between frames 32 apart."""

Pair = tuple[bytes, bytes]
"""Digests of two frames."""


class GmFlow(NetworkFlow):
    """Flow by global matching (a `FlowProvider`); an initial flow makes no difference to it.

    Args:
        weights: which ones.
        device: torch device; half precision and batches on CUDA.
        refine: at a quarter of the size, which takes most of the time; else the flow of the global
            matching at an eighth, as a start for another method.

    Raises:
        OmniError: the weights are missing, unreadable or of another network.
    """

    def __init__(self, weights: Weights, device: str = "cpu", refine: bool = True):
        self.name = weights.name if refine else f"{weights.name}-coarse"
        network = GMFlow()
        try:
            network.load_state_dict(read_weights(weights.path))
        except Exception as error:  # a torn file raises whatever its reader meets first
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OmniError(
                f"{weights.path} does not hold GMFlow weights ({reason}): give another file as "
                "flow.weights, run `omni weights get gmflow`, or use flow.provider=dis"
            ) from None
        super().__init__(network, device, "GMFlow", CACHED_FRAMES)
        self._refine = refine
        self._flows: OrderedDict[Pair, np.ndarray] = OrderedDict()

    def estimate_batch(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        """Flow of several pairs of one size, as many at once as memory holds."""
        images = {frame_digest(image): image for pair in pairs for image in pair[:2]}
        keys = [(frame_digest(first), frame_digest(second)) for first, second, _ in pairs]
        # In one order for both directions, so that neither depends on which was asked for first.
        missing = sorted({(min(key), max(key)) for key in keys if key not in self._flows})
        while missing:
            some = missing[: self._most]
            found = self._attempt(partial(self._match, some, images), len(some))
            if found is not None:
                self._flows.update(found)
                missing = missing[len(some) :]
        flows = [self._flows[key].copy() for key in keys]
        while len(self._flows) > CACHED_FLOWS:
            self._flows.popitem(last=False)
        return flows

    @torch.inference_mode()
    def _match(self, pairs: list[Pair], images: dict[bytes, np.ndarray]) -> dict[Pair, np.ndarray]:
        """Flow of pairs in both directions."""
        first, second = (self._stack([images[pair[side]] for pair in pairs]) for side in (0, 1))
        with self._half():
            flow = self._network(first, second, self._refine).float()
        size = images[pairs[0][0]].shape[:2]
        scale = flow.new_tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]])
        flow = F.interpolate(flow, size, mode="bilinear") * scale[:, None, None]
        flows = flow.movedim(1, -1).cpu().numpy()
        keys = [*pairs, *((second, first) for first, second in pairs)]
        return {key: one.copy() for key, one in zip(keys, flows, strict=True)}

    def _prepared(self, batch: Tensor) -> Tensor:
        size = _enlarged_size((batch.shape[2], batch.shape[3]))
        return F.interpolate(batch / 255, size, mode="bilinear")


def _enlarged_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size (h, w) at which frames of `size` are matched: multiples of MULTIPLE."""
    factor = min(LARGEST_FACTOR, max(1.0, SHORT_SIDE / min(size)))
    height, width = (max(1, round(side * factor / MULTIPLE)) * MULTIPLE for side in size)
    return height, width
