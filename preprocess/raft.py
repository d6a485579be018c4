"""RAFT as a flow provider: where its weights come from, and frames encoded once per video."""

import hashlib
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
from preprocess.flow import weights_digest
from preprocess.motion import Motion
from preprocess.network import SMALLEST_SIDE, FlowNetwork, read_weights

__all__ = ["EMBEDDED", "RaftFlow", "Weights", "find_weights"]

EMBEDDED = Path(__file__).with_name("raft_small.safetensors")
"""Our own weights, in builds that ship some (docs/model_card_raft.md)."""

_UPDATES = 20  # the original's number
_CACHED_FRAMES = 80  # a gap-32 level alternates between frames 32 apart
_GPU_BATCH = 8  # pairs: 0.7 GB of correlation at 384x683
_DOWNLOAD_SECONDS = 10.0


@dataclass(frozen=True)
class Weights:
    """A weights file, the architecture it is of (`large` or `small`), and where it comes from."""

    path: Path
    variant: str
    origin: str

    @property
    def name(self) -> str:
        """Identifies the weights by their content; those of a build are not a user's choice."""
        kind = "embedded" if self.origin == "embedded" else self.variant
        return f"raft-{kind}-{weights_digest(str(self.path))}"


def find_weights(variant: str, given: str = "") -> Weights:
    """The weights to use: the file `given`, else torchvision's (cached, downloaded), else ours.

    Args:
        variant: `large` or `small`; ours are always small.
        given: .pth or .safetensors file, or empty.

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
        self.batch = _GPU_BATCH if self._device.type == "cuda" else 1

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels from `image1` to `image2`, both `(h, w, 3)` uint8 RGB.

        Args:
            image1: source frame.
            image2: target frame.
            start: `(h, w, 2)` first guess in pixels, None for zero.
        """
        return self.estimate_batch([(image1, image2, start)])[0].flow

    @torch.inference_mode()
    def estimate_batch(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    ) -> list[Motion]:
        """Motion of several pairs of one size at once; each `(image1, image2, start)`."""
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
