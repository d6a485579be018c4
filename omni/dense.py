"""Every pixel's trajectory to a file, with bounded memory.

Letters: H' x W' grid points, T times.
"""

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omni.coords import grid_queries, pixel_centers
from omni.readout import Reader

__all__ = ["write_dense"]


def write_dense(
    reader: Reader, path: Path, frame: float, stride: int, times: np.ndarray | None = None
) -> None:
    """Write every grid pixel's track as (H', W', T, ...) arrays, through memory-mapped files.

    Args:
        reader: of the run.
        path: `.npz` to write, replaced when complete.
        frame: frame of the grid.
        stride: of the grid, original pixels.
        times: times in frames to answer at; None: every frame.
    """
    height, width = reader.video_size
    rows = len(pixel_centers((height, width), stride))
    points = grid_queries((height, width), frame, stride).reshape(rows, -1, 3)
    columns = points.shape[1]
    count = reader.num_frames if times is None else len(times)
    layout = {"tracks": ((2,), "f4"), "visible": ((), "?"), "visibility": ((), "f4")}
    layout["sigma"] = ((), "f4")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        arrays = {
            name: np.lib.format.open_memmap(
                Path(folder) / f"{name}.npy", "w+", dtype, (rows, columns, count, *tail)
            )
            for name, (tail, dtype) in layout.items()
        }
        band = max(1, 4 * reader.chunk // columns)
        for row in tqdm(range(0, rows, band), desc="export", unit="band", disable=None):
            part = reader.tracks(points[row : row + band].reshape(-1, 3), times)
            for name, array in arrays.items():
                values = getattr(part, name)
                array[row : row + band] = values.reshape(-1, columns, *values.shape[1:])
        temporary = Path(folder) / "dense.npz"
        np.savez(
            temporary,
            **arrays,
            query_points=points,
            size=np.asarray((height, width)),
            fps=reader.fps,
            format_version=1,
        )
        temporary.replace(path)
