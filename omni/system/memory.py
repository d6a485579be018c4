"""How much memory is available, checked before it is taken, and errors for lack of memory."""

import os
from collections.abc import Iterator
from pathlib import Path

from omni.errors import OmniError

__all__ = ["available_memory", "out_of_memory", "require_memory"]

_MESSAGES = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
    "Insufficient memory",
    "can't start new thread",
)
"""Parts of the errors of torch on a CPU, CUDA, cuBLAS or cuDNN, OpenCV and Python when memory runs
out."""


def available_memory() -> int:
    """Bytes that can still be taken: what the machine has free, or less in a container.

    What the system only caches of files counts as free, since it gives that back.
    """
    return min([_free_of_machine(), *_free_of_groups()])


def _free_of_machine() -> int:
    for line in _text("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    # Where the system does not report it (macOS): all there is.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_groups() -> Iterator[int]:
    """What the limits of this process's control groups, and of those around them, leave."""
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, used, prefix = "/sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, prefix = "/sys/fs/cgroup/memory", "total_"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        innermost = Path(top + path)
        for folder in (innermost, *innermost.parents):
            most, taken = _text(folder / limit), _text(folder / used)
            if most.isdecimal() and taken.isdecimal():
                rows = map(str.split, _text(folder / "memory.stat").splitlines())
                cached = (f"{prefix}inactive_file", f"{prefix}active_file")
                freed = sum(int(row[1]) for row in rows if row[0] in cached)
                yield max(0, int(most) - max(0, int(taken) - freed))


def require_memory(needed: int, what: str, advice: str) -> None:
    """Check that `needed` bytes can be taken.

    Raises:
        OmniError: they cannot; names `what` needs them and gives the `advice`.
    """
    available = available_memory()
    if needed > available:
        raise OmniError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, but only {available / 1e9:.1f} GB are "
            f"available: {advice}"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether numpy, OpenCV, or torch on a GPU or a CPU failed for lack of memory."""
    library = isinstance(error, RuntimeError) or type(error).__module__ == "cv2"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (library and any(text in str(error) for text in _MESSAGES))
    )


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
