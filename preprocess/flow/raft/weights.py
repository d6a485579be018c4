"""Where RAFT's weights come from: given by the user, or torchvision's."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.models import optical_flow

from omni.errors import OmniError

__all__ = ["Weights", "find_weights", "weights_digest"]

_DOWNLOAD_SECONDS = 10.0


def weights_digest(path: str) -> str:
    """Short hash of a weights file's content, empty for no path.

    Raises:
        OmniError: there is no such file.
    """
    if not path:
        return ""
    if not Path(path).is_file():
        raise OmniError(f"flow.weights {path} is not a file: give a RAFT .pth or .safetensors file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


@dataclass(frozen=True)
class Weights:
    """A weights file and the architecture it is of.

    variant: `large` or `small`. origin: `given` by the user or `torchvision`.
    """

    path: Path
    variant: str
    origin: str

    @property
    def name(self) -> str:
        """Identifies the weights by their architecture and content.

        Raises:
            OmniError: there is no such file.
        """
        return f"raft-{self.variant}-{weights_digest(str(self.path))}"


def find_weights(variant: str, given: str = "") -> Weights:
    """The weights to use: the file `given`, else torchvision's, cached or downloaded.

    Args:
        variant: `large` or `small`.
        given: .pth or .safetensors file, or empty.

    Returns:
        Where they are; a `given` file is not opened yet.

    Raises:
        OmniError: there are no weights to be had.
    """
    if given:
        return Weights(Path(given), variant, "given")
    try:
        return Weights(_torchvision_weights(variant), variant, "torchvision")
    except (OSError, RuntimeError) as error:
        raise OmniError(
            f"RAFT weights are neither cached at {_torchvision_path(variant)} nor could be "
            f"downloaded ({error}): put the file there, name one as flow.weights, or use "
            "flow.provider=dis"
        ) from None


def _torchvision_path(variant: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _torchvision_url(variant).rsplit("/", 1)[1]


def _torchvision_url(variant: str) -> str:
    return getattr(optical_flow, f"Raft_{variant.capitalize()}_Weights").DEFAULT.url


def _torchvision_weights(variant: str) -> Path:
    """Path of torchvision's weights, downloaded if they are not cached."""
    path = _torchvision_path(variant)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _short_timeout():
            digest = path.stem.rsplit("-", 1)[1]
            url = _torchvision_url(variant)
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
    return path


@contextmanager
def _short_timeout() -> Iterator[None]:
    """torch.hub takes no timeout; without one an unreachable host blocks for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
