"""What of this machine `omni` can use, and how to repair the rest."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omni.errors import OmniError
from omni.system.memory import available_memory

__all__ = ["Finding", "examine_machine", "look"]

_PACKAGES = "omni torch torchvision numpy scipy av imageio-ffmpeg pillow tensorboard tyro"
_OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
_LITTLE_DISK, _LITTLE_MEMORY = 5e9, 3e9


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        status: `ok`; `note`, works but could be better; `problem`, something will fail.
        what: what was found.
        advice: what to do about it; empty where nothing has to be done.
    """

    status: Literal["ok", "note", "problem"]
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.what}" + (f"\n         -> {self.advice}" * bool(self.advice))


def look(what: str, attempt: Callable[[], object], advice: str = "") -> Finding:
    """Whether an attempt succeeds.

    Args:
        what: is the case when it does.
        attempt: raises OSError, ImportError or OmniError when it does not.
        advice: what to do then; where empty, the part of an OmniError after its colon.
    """
    try:
        attempt()
    except (OmniError, OSError, ImportError) as error:
        reason, _, remedy = str(error).partition(": ")
        if advice:
            return Finding("problem", f"{what}: no ({error})", advice)
        return Finding("problem", reason, remedy)
    return Finding("ok", what)


def examine_machine(folder: Path) -> Generator[Finding, None, bool]:
    """Findings on versions, GPU, tiny-cuda-nn, memory, OpenCV, and the disk of a folder.

    Returns:
        Whether torch can be used.
    """
    yield _versions()
    yield _opencv()
    usable = _torch()
    if usable is None:
        yield from _gpu()
        yield _weights()
    else:
        yield usable
    yield _memory()
    yield _disk(folder)
    return usable is None


def _versions() -> Finding:
    found = [f"{name} {_version(name) or 'missing'}" for name in _PACKAGES.split()]
    what = f"Python {platform.python_version()} on {platform.platform()}; {', '.join(found)}"
    if any(name.endswith("missing") for name in found):
        return Finding("problem", what, "install what is missing: pip install -e .")
    return Finding("ok", what)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _opencv() -> Finding:
    installed = [f"{name} {_version(name)}" for name in _OPENCV if _version(name)]
    if len(installed) > 1:
        names = " ".join(item.split()[0] for item in installed)
        return Finding(
            "problem",
            f"OpenCV is installed {len(installed)} times ({', '.join(installed)}): they overwrite "
            "each other's files",
            f"pip uninstall -y {names} && pip install opencv-python",
        )
    repair = "pip install --force-reinstall opencv-python"
    try:
        import cv2

        cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        cv2.VariationalRefinement.create()
    except (ImportError, AttributeError) as error:
        return Finding("problem", f"OpenCV does not work ({error})", repair)
    return Finding("ok", f"OpenCV {cv2.__version__} with DIS and variational refinement")


def _torch() -> Finding | None:
    """What keeps torch from being imported; None where nothing does."""
    try:
        import torch  # noqa: F401 - a broken one fails in many ways
    except Exception as error:
        what = f"torch does not import ({' '.join(str(error).split())[:200]})"
        return Finding("problem", what, "pip install --force-reinstall torch torchvision")
    return None


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None and _runs("nvidia-smi", "-L")
        if driver:
            what = f"an NVIDIA GPU is here, but torch {torch.__version__} cannot use it"
            yield Finding("problem", what, "install the torch build for this driver: pytorch.org")
        else:
            yield Finding("note", "no CUDA device", "the cpu preset is used; a GPU is much faster")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        what = f"cuda:{index} {facts.name}, {free:.1f} of {total:.1f} GiB free"
        advice = (
            "other programs take its memory: nvidia-smi shows which" if free < total / 2 else ""
        )
        yield Finding("note" if advice else "ok", what, advice)
    if importlib.util.find_spec("tinycudann") is None:
        yield Finding("note", "tiny-cuda-nn is not installed", "optional; see environment.yml")
    elif not _runs(sys.executable, "-c", "import tinycudann"):
        yield Finding("problem", "tiny-cuda-nn does not import", "build it for this GPU and torch")
    else:
        yield Finding("ok", "tiny-cuda-nn")


def _runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _weights() -> Finding:
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = sorted(path.name for path in folder.glob("raft_*.pth"))
    if found:
        return Finding("ok", f"RAFT weights: {', '.join(found)}")
    return Finding(
        "note",
        f"no RAFT weights in {folder}",
        "DIS is used without a GPU; with one they are downloaded (see also omni weights)",
    )


def _memory() -> Finding:
    free, cores = available_memory(), os.cpu_count()
    what = f"{free / 1e9:.1f} GB of memory available, {cores} cores"
    if free < _LITTLE_MEMORY:
        return Finding("note", what, "use --config cpu and a lower data.resolution")
    return Finding("ok", what)


def _disk(folder: Path) -> Finding:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    what = f"{free / 1e9:.1f} GB free at {existing.absolute()}"
    if not os.access(existing, os.W_OK):
        return Finding("problem", f"{existing} is read-only", "choose a run folder elsewhere: -o")
    if free < _LITTLE_DISK:
        return Finding("note", what, "a 100-frame video needs about 1 GB: free some, or use -o")
    return Finding("ok", what)
