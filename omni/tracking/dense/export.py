"""Every pixel's trajectory to a file, with bounded memory.

Letters: H' x W' grid points, T times.
"""

import math
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omni.errors import OmniError
from omni.maths import grid_queries, pixel_centers
from omni.system import locked, sync_folder, unwritable
from omni.tracking.readout import Reader

__all__ = ["write_dense"]

_LAYOUT = {"tracks": ((2,), "<f4"), "visible": ((), "|b1"), "visibility": ((), "<f4")}
_LAYOUT["sigma"] = ((), "<f4")
_BLOCK = 1 << 22


def write_dense(
    reader: Reader, path: Path, frame: float, stride: int, times: np.ndarray | None = None
) -> None:
    """Write every grid point's track as (H', W', T, ...) arrays.

    Bands of rows are appended to plain files in `.NAME.partial` beside `path`, which are then
    packed: never through a memory map, whose pages count as memory, and which kills the process
    when the disk is full.

    Args:
        reader: of the run.
        path: `.npz` to write, replaced when complete.
        frame: frame of the grid.
        stride: of the grid, original pixels.
        times: times in frames of the trajectories; None: every frame.

    Raises:
        OmniError: the disk is too small, or another process writes the same file.
    """
    height, width = reader.video_size
    rows = len(pixel_centers((height, width), stride))
    points = grid_queries((height, width), frame, stride).reshape(rows, -1, 3)
    count = reader.num_frames if times is None else len(times)
    shape = (*points.shape[:2], count)
    folder = path.with_name(f".{path.name}.partial")
    try:
        with locked(folder), _cleaned(folder):
            _require_space(path, math.prod(shape))
            _write_bands(reader, points, shape, times, folder)
            metadata = {"query_points": points, "size": np.asarray((height, width))}
            metadata |= {"fps": np.array(reader.fps, np.float64)}
            metadata |= {"format_version": np.array(1, np.int64)}
            _pack(folder, metadata)
            os.replace(folder / "dense.npz", path)
            sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):  # another export's folder is not empty
            folder.rmdir()


@contextmanager
def _cleaned(folder: Path) -> Iterator[None]:
    """Remove this export's files in `folder`, before (left by a killed export) and after."""
    try:
        _remove_files(folder)
        yield
    finally:
        _remove_files(folder)


def _remove_files(folder: Path) -> None:
    for name in (*(f"{name}.npy" for name in _LAYOUT), "dense.npz"):
        (folder / name).unlink(missing_ok=True)


def _require_space(path: Path, entries: int) -> None:
    # Twice: the plain arrays, and the archive packed from them.
    needed = 2 * entries * sum(math.prod(t) * np.dtype(d).itemsize for t, d in _LAYOUT.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OmniError(
            f"{path} needs {needed / 1e9:.1f} GB while it is written, but only {free / 1e9:.1f} GB "
            "are free there: free some, raise --grid, or choose another folder with -o"
        )


def _write_bands(
    reader: Reader,
    points: np.ndarray,
    shape: tuple[int, int, int],
    times: np.ndarray | None,
    folder: Path,
) -> None:
    files = {name: open(folder / f"{name}.npy", "wb") for name in _LAYOUT}
    try:
        for name, (tail, dtype) in _LAYOUT.items():
            header = {"descr": dtype, "fortran_order": False, "shape": (*shape, *tail)}
            np.lib.format.write_array_header_1_0(files[name], header)
        band = max(1, reader.chunk // shape[1])
        for row in tqdm(range(0, shape[0], band), desc="export", unit="band", disable=None):
            part = reader.tracks(points[row : row + band].reshape(-1, 3), times)
            for name, (_, dtype) in _LAYOUT.items():
                files[name].write(getattr(part, name).astype(dtype).tobytes())
    finally:
        for file in files.values():
            file.close()


def _pack(folder: Path, metadata: dict[str, np.ndarray]) -> None:
    """All arrays as `folder/dense.npz`, uncompressed, in the layout of `numpy.savez`."""
    with open(folder / "dense.npz", "wb") as target:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name in _LAYOUT:
                with (
                    open(folder / f"{name}.npy", "rb") as source,
                    archive.open(f"{name}.npy", "w", force_zip64=True) as member,
                ):
                    shutil.copyfileobj(source, member, _BLOCK)
            for name, value in metadata.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        target.flush()
        os.fsync(target.fileno())
