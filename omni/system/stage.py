"""A stage of preprocessing while it is written: arrays on disk that survive an interruption."""

import json
import math
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from omni.errors import DamagedError
from omni.system.files import crc32_of, read_json, sync_folder, write_atomic

__all__ = ["Stage"]


class Stage:
    """An unfinished stage: memory-mapped arrays plus one checksum per finished item.

    A checksum records that an item was written, and shows whether it reached the disk: a power loss
    may keep either one without the other. Space is taken when the stage starts, since a memory map
    on a full disk kills the process without an error.

    Attributes:
        arrays: name to writable memory map.
        done: (items,) bool, what earlier (interrupted) work already wrote.
        meta: JSON-safe notes on the output, for the manifest.
    """

    def __init__(self, folder: Path, key: str, arrays: dict[str, tuple], items: int):
        self._folder, self._names = folder, list(arrays)
        state = folder / "stage.partial.json"
        expected = {"key": key, "arrays": _describe(arrays), "items": items}
        if read_json(state) != expected or not self._restore(arrays, items):
            with suppress(FileNotFoundError):
                state.unlink()
            for name, (shape, dtype) in arrays.items():
                _allocate(self._partial(name), dtype, shape)
            self._sums_path.unlink(missing_ok=True)  # it may lead elsewhere
            self._sums_path.write_bytes(bytes(8 * items))
            write_atomic(state, json.dumps(expected).encode())
        self.arrays = {
            name: np.lib.format.open_memmap(self._partial(name), "r+") for name in arrays
        }
        self._sums = np.memmap(self._sums_path, dtype=np.uint64, mode="r+", shape=(items,))
        self.meta: dict[str, Any] = {}
        self.done = self._sums > 0
        for item in np.flatnonzero(self.done).tolist():
            self.done[item] = self._sums[item] == self._sum(item)

    @property
    def _sums_path(self) -> Path:
        return self._folder / "stage.done"

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.partial.npy"

    def _restore(self, arrays: dict[str, tuple], items: int) -> bool:
        """Whether the files of an interrupted stage are there, renamed ones brought back."""
        if not _is_own(self._sums_path) or self._sums_path.stat().st_size != 8 * items:
            return False
        for name in arrays:
            final = self._folder / f"{name}.npy"
            if not self._partial(name).is_file() and final.is_file():
                os.replace(final, self._partial(name))
        return all(
            _is_own(self._partial(name))
            and _header(self._partial(name)) == (tuple(shape), np.dtype(dtype))
            for name, (shape, dtype) in arrays.items()
        )

    def _sum(self, item: int) -> int:
        """1 + CRC-32 of an item in every array; 0 means that it is not written."""
        value = 0
        for array in self.arrays.values():
            value = zlib.crc32(np.ascontiguousarray(array[item]).data, value)
        return 1 + value

    def mark(self, item: int) -> None:
        """Note that `item` is written completely. Call after writing it to every array."""
        self._sums[item] = self._sum(item)
        self.done[item] = True

    def flush(self) -> None:
        """Push everything written so far to disk."""
        for array in self.arrays.values():
            array.flush()
        self._sums.flush()

    def close(self) -> dict[str, dict[str, Any]]:
        """Rename the arrays to their final names; returns size and checksum of each.

        Raises:
            DamagedError: a finished item is not as it was written.
        """
        self.flush()
        for item in np.flatnonzero(self._sums).tolist():
            if self._sums[item] != self._sum(item):
                raise DamagedError(
                    f"{self._partial(self._names[0])} was changed while it was written: see which "
                    "other process writes there, or check the disk, then run the same command again"
                )
        self.arrays.clear()
        records = {}
        for name in self._names:
            records[f"{name}.npy"] = {
                "bytes": self._partial(name).stat().st_size,
                "crc32": crc32_of(self._partial(name)),
            }
        for name in self._names:
            os.replace(self._partial(name), self._folder / f"{name}.npy")
        sync_folder(self._folder)
        return records

    def forget(self) -> None:
        """Remove the notes of a stage that the manifest now holds."""
        for path in (self._folder / "stage.partial.json", self._sums_path):
            path.unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    """Whether writing to a file changes no file of another name or place."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _describe(arrays: dict[str, tuple]) -> dict[str, list]:
    return {name: [list(shape), np.dtype(dtype).str] for name, (shape, dtype) in arrays.items()}


def _allocate(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Make an `.npy` file of zeros that owns its disk space.

    Raises:
        OSError: the disk cannot hold it.
    """
    path.unlink(missing_ok=True)
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, facts)
        file.flush()
        length = math.prod(shape) * np.dtype(dtype).itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), file.tell(), length)
        else:
            file.truncate(file.tell() + length)


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and type of an `.npy` file whose size is what they require; else None."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
            whole = os.fstat(file.fileno()).st_size == size
    except Exception:  # a hostile header can fail anywhere in numpy's parser
        return None
    return (shape, dtype) if whole and not fortran else None
