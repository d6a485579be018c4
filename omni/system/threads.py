"""Independent slices of a computation on threads that use one core each.

numpy and OpenCV do most of a read-out on one core and release the interpreter lock meanwhile, so
that slices run in parallel; libraries with threads of their own are limited to one.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from omni.system.memory import available_memory

__all__ = ["run_in_slices", "single_threaded_opencv", "torch_threads"]

SMALLEST_PART = 64
"""Items below which another thread saves nothing."""


def run_in_slices(work: Callable[[slice], Any], count: int, most: int, memory: int) -> list[Any]:
    """What `work` returns for slices that cover `count` items, in their order.

    As many threads as torch may use work on slices of nearly equal length.

    Args:
        work: its result for an item does not depend on the rest of the slice.
        count: number of items; 0 gives one empty slice.
        most: most items in a slice.
        memory: bytes that one slice takes; fewer threads run where so much is not available.
    """
    import torch

    allowed = torch.get_num_threads()
    fitting = max(1, available_memory() // memory)
    threads = min(allowed, fitting, max(1, count // SMALLEST_PART))
    rounds = -(-count // (threads * max(1, most))) or 1
    bounds = [count * k // (threads * rounds) for k in range(threads * rounds + 1)]
    slices = map(slice, bounds[:-1], bounds[1:])
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    # One thread is this one: another's stack is memory that may not be there.
    each = pool.map if threads > 1 else map
    try:
        with single_threaded_opencv():
            return list(each(work, slices))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(allowed)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch on so many CPU threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """OpenCV on one thread: DIS splits its work by threads, which changes its result."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
