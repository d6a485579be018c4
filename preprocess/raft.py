"""RAFT from torchvision, split so that a frame is encoded once and far pairs start warm."""

import hashlib
import socket
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import optical_flow
from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

from omni.errors import OmniError
from preprocess.flow import weights_digest

__all__ = ["RaftFlow"]

_UPDATES = 20  # the original's number
_CACHED_FRAMES = 80  # a gap-32 level alternates between frames 32 apart
_DOWNLOAD_SECONDS = 10.0
_SMALLEST_SIDE = 128  # four levels of correlation at 1/8 resolution


class RaftFlow:
    """Flow by recurrent all-pairs field transforms (a `FlowProvider`).

    Source: Teed and Deng, RAFT, ECCV 2020; torchvision's network and weights.

    Args:
        variant: `large` or `small`.
        weights: state dict (.pth or .safetensors); empty for torchvision's own.
        device: torch device; half precision on CUDA.

    Raises:
        OmniError: the weights are missing, unreadable, or of another network.
    """

    workers = 1

    def __init__(self, variant: str = "large", weights: str = "", device: str = "cpu"):
        path = Path(weights or _torchvision_weights(variant))
        builder = getattr(optical_flow, f"raft_{variant}")
        self.name = f"raft-{variant}-{weights_digest(str(path))}"
        self._model = builder(weights=None).to(device).eval()
        try:
            self._model.load_state_dict(_read_weights(path))
        except Exception as error:  # a torn file raises whatever its reader meets first
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OmniError(
                f"{path} does not hold torchvision RAFT-{variant} weights ({reason}): "
                "give another file as flow.weights, or use flow.provider=dis"
            ) from None
        self._device = torch.device(device)
        self._encoded: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    @torch.inference_mode()
    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels from `image1` to `image2`, both `(h, w, 3)` uint8 RGB.

        Args:
            image1: source frame.
            image2: target frame.
            start: `(h, w, 2)` first guess in pixels, None for zero.
        """
        size = image1.shape[:2]
        features1, context = self._encode(image1)
        features2, _ = self._encode(image2)
        flow = torch.zeros_like(context[:, :2])
        if start is not None:
            dense = torch.from_numpy(start).to(self._device).movedim(-1, 0)[None]
            dense = F.pad(dense, _padding(size), mode="replicate")
            flow = F.avg_pool2d(dense, 8) / 8
        flow = self._iterate(features1, features2, context, flow)
        return flow[0, :, : size[0], : size[1]].movedim(0, -1).contiguous().cpu().numpy()

    def _encode(self, image):
        key = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        if key not in self._encoded:
            batch = torch.from_numpy(image).to(self._device).movedim(-1, 0)[None].float()
            batch = F.pad(batch / 127.5 - 1, _padding(image.shape[:2]), mode="replicate")
            with self._half():
                features = self._model.feature_encoder(batch).float()
                self._encoded[key] = features, self._model.context_encoder(batch).float()
        self._encoded.move_to_end(key)
        while len(self._encoded) > _CACHED_FRAMES:
            self._encoded.popitem(last=False)
        return self._encoded[key]

    def _iterate(self, features1, features2, context, flow):
        """Run torchvision's `RAFT.forward` after the encoders, started at `flow` (1/8 pixels)."""
        model = self._model
        model.corr_block.build_pyramid(features1, features2)
        hidden_size = model.update_block.hidden_state_size
        hidden = torch.tanh(context[:, :hidden_size])
        context = F.relu(context[:, hidden_size:])
        origin = make_coords_grid(1, *context.shape[-2:]).to(self._device)
        with self._half():
            for _ in range(_UPDATES):
                correlation = model.corr_block.index_pyramid(origin + flow)
                hidden, change = model.update_block(hidden, context, correlation, flow)
                flow = flow + change.float()
            mask = None if model.mask_predictor is None else model.mask_predictor(hidden).float()
        return upsample_flow(flow, mask)

    def _half(self):
        return torch.autocast(self._device.type, torch.float16, self._device.type == "cuda")


def _padding(size):
    """Right and bottom padding (torch order) to multiples of 8 and to the smallest side."""
    bottom, right = (max(_SMALLEST_SIDE, -(-side // 8) * 8) - side for side in size)
    return 0, right, 0, bottom


def _read_weights(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _torchvision_weights(variant):
    url = getattr(optical_flow, f"Raft_{variant.capitalize()}_Weights").DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _short_timeout():
            digest = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise OmniError(
            f"RAFT weights are neither cached at {path} nor could be downloaded ({error}): "
            "put the file there, name one as flow.weights, or use flow.provider=dis"
        ) from None
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
