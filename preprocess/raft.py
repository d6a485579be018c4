"""RAFT as a flow provider: where its weights come from, and frames encoded once per video."""

import hashlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import optical_flow

from omni.errors import OmniError
from omni.memory import out_of_memory
from preprocess.flow import weights_digest
from preprocess.motion import Motion
from preprocess.network import SMALLEST_SIDE, FlowNetwork, read_weights

__all__ = ["EMBEDDED", "RaftFlow", "Weights", "find_weights"]

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("raft_small.safetensors")
"""Our own weights, in builds that ship some (docs/model_card_raft.md)."""

_UPDATES = 20  # the original's number
_CACHED_FRAMES = 80  # a gap-32 level alternates between frames 32 apart
_MOST_PAIRS = 8
_CORRELATIONS = 2**28  # at once: 1.4 GB with their pyramid; 6 pairs at 480x854
_DOWNLOAD_SECONDS = 10.0


@dataclass(frozen=True)
class Weights:
    """A weights file, the architecture it is of (`large` or `small`), and where it comes from."""

    path: Path
    variant: str
    origin: str

    @property
    def name(self) -> str:
        """Identifies the weights by their content; those of a build are not a user's choice.

        Raises:
            OmniError: there is no such file.
        """
        kind = "embedded" if self.origin == "embedded" else self.variant
        return f"raft-{kind}-{weights_digest(str(self.path))}"


def find_weights(variant: str, given: str = "") -> Weights:
    """The weights to use: the file `given`, else torchvision's (cached, downloaded), else ours.

    Args:
        variant: `large` or `small`; ours are always small.
        given: .pth or .safetensors file, or empty.

    Returns:
        Where they are; a `given` file is not looked at yet.

    Raises:
        OmniError: there are no weights to be had.
    """
    if given:
        return Weights(Path(given), variant, "given")
    try:
        return Weights(_torchvision_weights(variant), variant, "torchvision")
    except (OSError, RuntimeError) as error:
        if EMBEDDED.is_file():
            return Weights(EMBEDDED, "small", "embedded")
        raise OmniError(
            f"RAFT weights are neither cached at {_torchvision_path(variant)} nor could be "
            f"downloaded ({error}), and this build of omni embeds none: put the file there, name "
            "one as flow.weights, or use flow.provider=dis"
        ) from None


class RaftFlow:
    """Flow by recurrent all-pairs field transforms (a `FlowProvider`).

    Weights with heads (see `FlowNetwork`) also judge occlusion and sigma.

    Args:
        weights: which ones.
        device: torch device; half precision and batches on CUDA.

    Raises:
        OmniError: the weights are missing, unreadable or of another network.
    """

    workers = 1

    def __init__(self, weights: Weights, device: str = "cpu"):
        self.name = weights.name
        try:
            self._network = FlowNetwork.of(read_weights(weights.path), weights.variant)
        except Exception as error:  # a torn file raises whatever its reader meets first
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OmniError(
                f"{weights.path} does not hold RAFT-{weights.variant} weights ({reason}): give "
                "another file as flow.weights, the other kind as flow.raft, or use "
                "flow.provider=dis"
            ) from None
        self._network.to(device).eval()
        self._device = torch.device(device)
        self._encoded: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self.judges = self._network.heads is not None
        self._most = _MOST_PAIRS
        self.batch = self._most if self._device.type == "cuda" else 1

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow from `image1` to `image2`.

        Args:
            image1: source frame, `(h, w, 3)` uint8 RGB.
            image2: target frame, `(h, w, 3)` uint8 RGB.
            start: `(h, w, 2)` first guess in pixels, None for zero.

        Returns:
            `(h, w, 2)` float32 pixels.
        """
        return self.estimate_batch([(image1, image2, start)])[0].flow

    def estimate_batch(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    ) -> list[Motion]:
        """Motion of several pairs of one size, as many at once as memory holds.

        Args:
            pairs: each `(image1, image2, start)`, as `estimate` takes them.

        Returns:
            One motion per pair; `hidden` and `sigma` `(h, w)` only where the weights have heads.
        """
        motions = []
        while len(motions) < len(pairs):
            chunk = pairs[len(motions) :][: self._room(pairs[0][0].shape[:2])]
            found = self._attempt(chunk)
            if found is None:
                self._free(len(chunk))
            else:
                motions += found
        return motions

    def _room(self, size: tuple[int, int]) -> int:
        """Pairs of images of `size` that are computed at once."""
        right, bottom = _padding(size)[1::2]
        cells = (size[0] + bottom) * (size[1] + right) // 64
        return max(1, min(self._most, _CORRELATIONS // cells**2))

    def _attempt(self, pairs) -> list[Motion] | None:
        """Motion of the pairs; None if memory ran out and there is something to give up."""
        try:
            return self._estimate(pairs)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or (len(pairs) == 1 and len(self._encoded) <= 2):
                raise
        return None  # only now does the error let go of what it stopped at

    def _free(self, failed: int) -> None:
        """Give up cached frames, and batches of the size that `failed`."""
        self._encoded.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if failed > 1:
            self._most = failed // 2
            logger.warning("out of memory: going on with RAFT batches of %d pairs", self._most)

    @torch.inference_mode()
    def _estimate(self, pairs) -> list[Motion]:
        height, width = pairs[0][0].shape[:2]
        features1, context = self._stack(pair[0] for pair in pairs)
        features2, _ = self._stack(pair[1] for pair in pairs)
        start = torch.cat([self._start(pair[2], context) for pair in pairs])
        with self._half():
            found = self._network(features1, features2, context, start, _UPDATES)

        def cut(field: Tensor) -> np.ndarray:
            return field[..., :height, :width].float().cpu().numpy()

        flows = np.ascontiguousarray(np.moveaxis(cut(found.flows[-1]), 1, -1))
        if not self.judges:
            return [Motion(flow) for flow in flows]
        hidden = cut(torch.sigmoid(found.occlusion))
        sigma = cut(torch.exp(found.log_variance / 2))
        return [Motion(*of_pair) for of_pair in zip(flows, hidden, sigma, strict=True)]

    def _stack(self, images: Iterator[np.ndarray]) -> tuple[Tensor, Tensor]:
        features, context = zip(*map(self._encode, images), strict=True)
        return torch.cat(features), torch.cat(context)

    def _encode(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features and context of one frame. Alone, so that they do not depend on the batch."""
        key = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        if key not in self._encoded:
            batch = torch.from_numpy(image).to(self._device).movedim(-1, 0)[None].float()
            batch = F.pad(batch / 127.5 - 1, _padding(image.shape[:2]), mode="replicate")
            with self._half():
                features, context = self._network.encode(batch)
            self._encoded[key] = features.float(), context.float()
        self._encoded.move_to_end(key)
        while len(self._encoded) > _CACHED_FRAMES:
            self._encoded.popitem(last=False)
        return self._encoded[key]

    def _start(self, start: np.ndarray | None, context: Tensor) -> Tensor:
        """(1, 2, h, w) first guess at feature resolution and in its pixels."""
        if start is None:
            return torch.zeros_like(context[:1, :2])
        dense = torch.from_numpy(start).to(self._device).movedim(-1, 0)[None]
        return F.avg_pool2d(F.pad(dense, _padding(start.shape[:2]), mode="replicate"), 8) / 8

    def _half(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.float16, self._device.type == "cuda")


def _padding(size):
    """Right and bottom padding (torch order) to multiples of 8 and to the smallest side."""
    bottom, right = (max(SMALLEST_SIDE, -(-side // 8) * 8) - side for side in size)
    return 0, right, 0, bottom


def _torchvision_path(variant):
    return Path(torch.hub.get_dir()) / "checkpoints" / _torchvision_url(variant).rsplit("/", 1)[1]


def _torchvision_url(variant):
    return getattr(optical_flow, f"Raft_{variant.capitalize()}_Weights").DEFAULT.url


def _torchvision_weights(variant):
    path = _torchvision_path(variant)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _short_timeout():
            digest = path.stem.rsplit("-", 1)[1]
            url = _torchvision_url(variant)
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
    return path


@contextmanager
def _short_timeout():
    """torch.hub takes no timeout; without one an unreachable host blocks for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
