"""Anchors: the points of a coarse grid of one frame, whose tracks all finer pixels start from.

Letters: A anchors, T frames. Raster pixels of the processing resolution.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np

from omni.maths import REFERENCE_SIDE, rescale
from omni.system import write_atomic
from omni.tracking.readout import Reader
from omni.tracking.selection import Selection

__all__ = ["Anchors", "anchor_grid", "answer_anchors"]

PITCH = 4.0
"""Pixels between anchors at a short side of 256."""

_SAVED = ("frame", "pitch", "columns", "labels", "xy", "trust", "visibility", "sigma")


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

    def save(self, path: Path, key: str) -> None:
        """Write them to an `.npz`, with the `key` of what they were computed from."""
        buffer, arrays = BytesIO(), vars(self) | vars(self.selected)
        np.savez(buffer, key=key, **{name: arrays[name] for name in _SAVED})
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, key: str) -> Self | None:
        """Those of a file; None where it is missing, damaged, or computed from something else."""
        with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile):
            with np.load(path, allow_pickle=False) as data:
                if data["key"] == key:
                    arrays = {name: data[name] for name in _SAVED}
                    selected = Selection(*(arrays.pop(field.name) for field in fields(Selection)))
                    frame, columns = int(arrays["frame"]), int(arrays["columns"])
                    return cls(frame, float(arrays["pitch"]), columns, arrays["labels"], selected)
        return None

    @property
    def rows(self) -> int:
        """Number of rows of anchors."""
        return len(self.labels) // self.columns


def answer_anchors(
    reader: Reader, frame: int, progress: Callable[[int], object] = lambda done: None
) -> Anchors:
    """Answer the anchors of a frame among all their candidates.

    Args:
        reader: of a fitted run.
        frame: whose pixels will be asked for.
        progress: called with the number of anchors finished in each chunk.
    """
    grid, pitch = anchor_grid(reader.size)
    xy = grid.reshape(-1, 2)
    original = rescale(xy, reader.size, reader.video_size)
    queries = np.column_stack([np.full(len(xy), frame), original[:, ::-1]]).astype(np.float32)
    selected = reader.select(queries, progress)
    return Anchors(frame, pitch, grid.shape[1], reader.links.labels(frame, xy), selected)


def anchor_grid(size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Positions `(rows, columns, 2)` of the anchors of a frame of `size` (h, w), and their pitch.

    A cell cut by the border of the frame has its anchor within the frame.
    """
    pitch = PITCH * min(size) / REFERENCE_SIDE
    height, width = size
    x, y = (
        np.minimum((np.arange(np.ceil(side / pitch)) + 0.5) * pitch, side - 0.5)
        for side in (width, height)
    )
    return np.stack(np.meshgrid(x, y), -1).astype(np.float32), pitch
