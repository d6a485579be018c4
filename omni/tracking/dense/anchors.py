"""Anchors: the points of a coarse grid of one frame, whose tracks all finer pixels start from.

Letters: A anchors, R rows of C anchors, T frames. Raster pixels of the processing resolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni.maths import REFERENCE_SIDE, rescale
from omni.system import Stage
from omni.tracking.readout import Reader
from omni.tracking.selection import Selection

__all__ = ["Anchors", "anchor_grid", "anchor_stage", "answer_anchors"]

PITCH, SMALLEST_PITCH = 4.0, 2.0
"""Pixels between anchors at a short side of 256, and in the smallest frames."""

AT_ONCE = 4096
"""Anchors that are answered, and marked as finished, together."""


@dataclass(frozen=True)
class Anchors:
    """Tracks of the anchors of one frame, row by row.

    Attributes:
        frame: the query frame of all of them.
        pitch: pixels between them.
        columns: anchors in a row.
        labels: (A,) mask labels at the anchors.
        selected: their smoothed positions and confidence, A points in T frames.
    """

    frame: int
    pitch: float
    columns: int
    labels: np.ndarray
    selected: Selection

    @property
    def rows(self) -> int:
        """Number of rows of anchors."""
        return len(self.labels) // self.columns


def anchor_grid(size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Positions `(R, C, 2)` of the anchors of a frame of `size` (h, w), and their pitch.

    A cell cut by the border of the frame has its anchor within the frame.
    """
    pitch = max(SMALLEST_PITCH, PITCH * min(size) / REFERENCE_SIDE)
    height, width = size
    x, y = (
        np.minimum((np.arange(np.ceil(side / pitch)) + 0.5) * pitch, side - 0.5)
        for side in (width, height)
    )
    return np.stack(np.meshgrid(x, y), -1).astype(np.float32), pitch


def anchor_stage(folder: Path, key: str, size: tuple[int, int], num_frames: int) -> Stage:
    """The file of anchors in a folder, with what an earlier call has finished.

    It holds `(R, C, T, 5)` x, y, trust, visibility, sigma, and is finished row by row.

    Args:
        folder: of one frame's anchors.
        key: hash of what they are computed from.
        size: (h, w) processing size.
        num_frames: T.

    Raises:
        OSError: it cannot be written.
    """
    rows, columns = anchor_grid(size)[0].shape[:2]
    return Stage(folder, key, {"anchors": ((rows, columns, num_frames, 5), np.float32)}, rows)


def answer_anchors(
    reader: Reader,
    frame: int,
    stage: Stage,
    progress: Callable[[int], object] = lambda done: None,
) -> Anchors:
    """Answer the anchors of a frame among all their candidates, but for those already finished.

    Args:
        reader: of a fitted run.
        frame: whose pixels will be asked for.
        stage: of `anchor_stage`.
        progress: called with the number of anchors that each step has finished.
    """
    grid, pitch = anchor_grid(reader.size)
    columns, values = grid.shape[1], stage.arrays["anchors"]
    # A checksum shows that a row is what was written, not that it was ours to write.
    stage.done &= np.isfinite(values).all((1, 2, 3))
    progress(columns * int(stage.done.sum()))
    try:
        missing = np.flatnonzero(~stage.done)
        for start in range(0, len(missing), max(1, AT_ONCE // columns)):
            rows = missing[start : start + max(1, AT_ONCE // columns)]
            original = rescale(grid[rows].reshape(-1, 2), reader.size, reader.video_size)
            queries = np.insert(original[:, ::-1], 0, frame, axis=1)
            shape, answers = (len(rows), columns, reader.num_frames, -1), reader.select(queries)
            parts = [value.reshape(shape) for value in vars(answers).values()]
            values[rows] = np.concatenate(parts, axis=-1)
            for row in rows.tolist():
                stage.mark(row)
            progress(len(queries))
    finally:
        stage.flush()
    flat = np.array(values).reshape(-1, reader.num_frames, 5)
    selected = Selection(flat[..., :2], *np.moveaxis(flat[..., 2:], -1, 0))
    labels = reader.links.labels(frame, grid.reshape(-1, 2))
    return Anchors(frame, pitch, columns, labels, selected)
