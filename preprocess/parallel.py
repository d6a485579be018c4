"""Running the independent items of a stage on threads, so that it can stop at any moment."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from omni.system import Stage, single_threaded_opencv

__all__ = ["progress_bar", "run_items", "worker_count"]

_FLUSH_SECONDS = 10.0


def worker_count(workers: int) -> int:
    """Number of threads: `workers`, or one per core that this process may use when it is 0."""
    if workers > 0:
        return workers
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def progress_bar(title: str, total: int, done: int, show: bool) -> tqdm:
    """A progress bar that only appears on a terminal, so that logs stay clean."""
    return tqdm(desc=title, total=total, initial=done, disable=None if show else True, leave=True)


def run_items(
    stage: Stage,
    levels: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], None],
    workers: int,
    bar: tqdm,
    batch: int = 1,
) -> None:
    """Call `work` for every group of `batch` items, level after level, and mark them as done.

    Within a level the order is free; a level starts when the one before it is finished. A group
    with an unfinished item is done again as a whole: rounding may depend on its composition.

    Args:
        stage: of which the items are.
        levels: item numbers.
        work: writes the given items to the stage's arrays, on any thread.
        workers: number of threads.
        bar: advanced by one per finished item.
        batch: items per group.
    """
    _keep_freed_memory()
    pool = ThreadPoolExecutor(workers)
    flushed = time.monotonic()
    try:
        with single_threaded_opencv():
            for level in levels:
                groups = [level[first : first + batch] for first in range(0, len(level), batch)]
                pending = [group for group in groups if not stage.done[group].all()]
                for group, _ in zip(pending, pool.map(work, pending), strict=True):
                    for item in group:
                        bar.update(not stage.done[item])
                        stage.mark(item)
                    if time.monotonic() - flushed > _FLUSH_SECONDS:
                        stage.flush()
                        flushed = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)


def _keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MB instead of returning each to the system.

    Otherwise every array of more than 128 KB costs page faults, a tenth of the time of a flow.
    glibc raises its threshold to the largest mapped block that was freed (mallopt(3), "dynamic
    mmap threshold"). The block is never written and thus takes no memory; without glibc it does
    nothing.
    """
    np.empty(31 << 20, np.uint8)
