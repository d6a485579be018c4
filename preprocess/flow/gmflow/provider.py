"""GMFlow as a flow provider: frames are encoded once, pairs matched once for both directions.

Implements the interface `preprocess.flow.provider.FlowProvider`.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from omni.errors import OmniError
from omni.system import out_of_memory
from preprocess.flow.gmflow.network import MULTIPLE, Features, GMFlow
from preprocess.flow.provider import ImagePair
from preprocess.flow.weights import Weights, read_weights

__all__ = ["GmFlow"]

logger = logging.getLogger(__name__)

SHORT_SIDE, LARGEST_FACTOR = 512, 2
"""Frames are enlarged to this short side in pixels, at most by this factor: flow of small frames is
off by up to 1.4 px, of frames enlarged twice it is not (docs/experiments/flow.md)."""

CACHED_FRAMES, CACHED_FLOWS = 40, 80
"""Kept for the pairs to come: a gap-32 level alternates between frames 32 apart."""

MOST_PAIRS = 8

Pair = tuple[bytes, bytes]
"""Digests of two frames."""


class GmFlow:
    """Flow by global matching (a `FlowProvider`); an initial flow makes no difference to it.

    Args:
        weights: which ones.
        device: torch device; half precision and batches on CUDA.
        refine: at a quarter of the size, which takes most of the time; else the flow of the global
            matching at an eighth, as a start for another method.

    Raises:
        OmniError: the weights are missing, unreadable or of another network.
    """

    workers = 1

    def __init__(self, weights: Weights, device: str = "cpu", refine: bool = True):
        self.name = weights.name if refine else f"{weights.name}-coarse"
        self._network = GMFlow()
        try:
            self._network.load_state_dict(read_weights(weights.path))
        except Exception as error:  # a torn file raises whatever its reader meets first
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OmniError(
                f"{weights.path} does not hold GMFlow weights ({reason}): give another file as "
                "flow.weights, run `omni weights get gmflow`, or use flow.provider=dis"
            ) from None
        self._network.to(device).eval()
        self._device, self._refine = torch.device(device), refine
        self._encoded: OrderedDict[bytes, Features] = OrderedDict()
        self._flows: OrderedDict[Pair, np.ndarray] = OrderedDict()
        self._most = MOST_PAIRS
        self.batch = self._most if self._device.type == "cuda" else 1

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, flow_init: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels from `image1` to `image2`, both `(h, w, 3)` uint8 RGB."""
        return self.estimate_batch([(image1, image2, flow_init)])[0]

    def estimate_batch(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        """Flow of several pairs of one size, as many at once as memory holds."""
        images = {_digest(image): image for pair in pairs for image in pair[:2]}
        keys = [(_digest(first), _digest(second)) for first, second, _ in pairs]
        # In one order for both directions, so that neither depends on which was asked for first.
        missing = sorted({(min(key), max(key)) for key in keys if key not in self._flows})
        while missing:
            some = missing[: self._most]
            if self._attempt(some, images):
                missing = missing[len(some) :]
            else:
                self._free(len(some))
        found = [self._flows[key].copy() for key in keys]
        while len(self._flows) > CACHED_FLOWS:
            self._flows.popitem(last=False)
        return found

    def _attempt(self, pairs: list[Pair], images: dict[bytes, np.ndarray]) -> bool:
        """Flow of pairs in both directions; False if memory ran out and some can be freed."""
        try:
            self._match(pairs, images)
            return True
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (len(pairs) == 1 and len(self._encoded) <= 2):
                raise
        return False  # outside the handler, where the error no longer holds on to the tensors

    def _free(self, failed: int) -> None:
        """Drop cached frames, and halve batches of the size that `failed`."""
        self._encoded.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if failed > 1:
            self._most = failed // 2
            logger.warning("out of memory: continuing with GMFlow batches of %d pairs", self._most)

    @torch.inference_mode()
    def _match(self, pairs: list[Pair], images: dict[bytes, np.ndarray]) -> None:
        first, second = (self._stack([pair[side] for pair in pairs], images) for side in (0, 1))
        with self._half():
            flow = self._network(first, second, self._refine).float()
        size = images[pairs[0][0]].shape[:2]
        scale = flow.new_tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]])
        flow = F.interpolate(flow, size, mode="bilinear") * scale[:, None, None]
        flows = flow.movedim(1, -1).cpu().numpy()
        keys = [*pairs, *((second, first) for first, second in pairs)]
        self._flows.update((key, one.copy()) for key, one in zip(keys, flows, strict=True))

    def _stack(self, keys: list[bytes], images: dict[bytes, np.ndarray]) -> Features:
        """Features of several frames as those of one batch."""
        eighth, quarter = zip(*(self._encode(key, images[key]) for key in keys), strict=True)
        return torch.cat(eighth), torch.cat(quarter)

    def _encode(self, key: bytes, image: np.ndarray) -> Features:
        """Features of one frame. Alone, so that they do not depend on the batch."""
        if key not in self._encoded:
            batch = torch.from_numpy(image).to(self._device).movedim(-1, 0)[None].float() / 255
            size = _enlarged_size((image.shape[0], image.shape[1]))
            batch = F.interpolate(batch, size, mode="bilinear")
            with self._half():
                eighth, quarter = self._network.encode(batch)
            self._encoded[key] = eighth.float(), quarter.float()
        self._encoded.move_to_end(key)
        while len(self._encoded) > CACHED_FRAMES:
            self._encoded.popitem(last=False)
        return self._encoded[key]

    def _half(self) -> torch.autocast:
        """Half precision, on CUDA devices only."""
        return torch.autocast(self._device.type, torch.float16, self._device.type == "cuda")


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _enlarged_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size (h, w) at which frames of `size` are matched: multiples of MULTIPLE."""
    factor = min(LARGEST_FACTOR, max(1.0, SHORT_SIDE / min(size)))
    height, width = (max(1, round(side * factor / MULTIPLE)) * MULTIPLE for side in size)
    return height, width
