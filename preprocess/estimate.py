"""Cost of preprocessing, estimated before it starts; refusal when the disk is too small."""

import io
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni.errors import OmniError
from omni.system import single_threaded_opencv
from preprocess.flow import FlowProvider
from preprocess.parallel import worker_count

__all__ = ["Arrays", "Estimate", "estimate_cost", "file_bytes", "fitting_workers", "require_space"]

_BASE_BYTES = 600 << 20  # interpreter with torch, OpenCV and a decoder
_PIXEL_BYTES = 460  # working set of one refined DIS flow per pixel, measured at 480x854
_VIDEO_PIXEL_BYTES = 12  # decoded frames on the way

Arrays = dict[str, tuple]
"""Name to (shape, dtype), as `Store.stage` takes it."""


@dataclass(frozen=True)
class Estimate:
    """Cost of preprocessing: bytes on disk (exact), bytes of memory and seconds (roughly)."""

    disk: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return f"{_size(self.disk)} on disk, {_size(self.memory)} of memory, {self._duration()}"

    def _duration(self) -> str:
        if self.seconds < 90:
            return f"about {max(1, math.ceil(self.seconds))} s"
        if self.seconds < 5400:
            return f"about {self.seconds / 60:.0f} min"
        return f"about {self.seconds / 3600:.1f} h"


@single_threaded_opencv()
def estimate_cost(
    images: tuple[np.ndarray, np.ndarray],
    video_size: tuple[int, int],
    pairs: np.ndarray,
    arrays: Arrays,
    provider: FlowProvider,
) -> Estimate:
    """Cost of the flows `pairs` `(K, 2)`, from timing one near and one far flow here and now.

    Args:
        images: two adjacent frames `(h, w, 3)` uint8 at processing size.
        video_size: (H, W) of the original.
        pairs: the schedule.
        arrays: everything that will be written.
        provider: the flow method.
    """
    far = np.count_nonzero(np.abs(pairs[:, 1] - pairs[:, 0]) > 1)
    began = time.perf_counter()
    flow = provider.estimate(*images)
    near_seconds = time.perf_counter() - began
    if far:
        provider.estimate(*images, flow)
    far_seconds = time.perf_counter() - began - near_seconds
    threads = min(provider.workers, worker_count(0))
    seconds = ((len(pairs) - far) * near_seconds + far * far_seconds) / threads
    pixels = math.prod(images[0].shape[:2])
    working = _PIXEL_BYTES * pixels * provider.workers
    memory = _BASE_BYTES + working + _VIDEO_PIXEL_BYTES * math.prod(video_size)
    return Estimate(file_bytes(arrays), memory, seconds)


def fitting_workers(
    workers: int, size: tuple[int, int], video_size: tuple[int, int], available: int
) -> int:
    """At most `workers` threads of flow at `size` (h, w), as many as `available` bytes hold."""
    room = available - _BASE_BYTES - _VIDEO_PIXEL_BYTES * math.prod(video_size)
    return max(1, min(workers, room // (_PIXEL_BYTES * math.prod(size))))


def file_bytes(arrays: Arrays) -> int:
    """Exact size on disk of `arrays` as .npy files, headers included."""
    total = 0
    for shape, dtype in arrays.values():
        header = io.BytesIO()
        facts = {"shape": shape, "fortran_order": False, "descr": np.dtype(dtype).str}
        np.lib.format.write_array_header_1_0(header, facts)
        total += len(header.getvalue()) + math.prod(shape) * np.dtype(dtype).itemsize
    return total


def require_space(folder: Path, arrays: Arrays) -> None:
    """Check that `arrays` still fit on the disk of the store `folder` (which need not exist).

    Writing to a memory map on a full disk kills the process without a message, hence this check.

    Raises:
        OmniError: too little space is free.
    """
    needed = file_bytes(arrays)
    for name in arrays:
        partial = folder / f"{name}.partial.npy"
        if partial.is_file():
            needed -= partial.stat().st_blocks * 512
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OmniError(
            f"{folder} needs {_size(needed)} more, but only {_size(free)} are free there: free "
            "some, choose another run folder, or lower data.resolution or flow.max_gap"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
