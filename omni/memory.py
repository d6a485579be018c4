"""How much memory there is, asked before it is taken, and what it looks like when it runs out."""

import os
from pathlib import Path

from omni.errors import OmniError

__all__ = ["available_memory", "out_of_memory", "require_memory"]


def available_memory() -> int:
    """Bytes that can still be taken: what the machine has free, or less in a container."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _text("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free = [int(value.split()[0]) * 1024]
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _text(f"{folder}/{limit}"), _text(f"{folder}/{used}")
        if limit.isdecimal() and used.isdecimal():
            free.append(max(0, int(limit) - int(used)))
    return min(free)


def require_memory(needed: int, what: str, advice: str) -> None:
    """Check that `needed` bytes can be taken.

    Raises:
        OmniError: they cannot; says `what` needs them and gives the `advice`.
    """
    available = available_memory()
    if needed > available:
        raise OmniError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, but only {available / 1e9:.1f} GB are "
            f"available: {advice}"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether numpy, torch on a GPU, or torch on a CPU failed for lack of memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
