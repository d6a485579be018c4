"""`Tracks`: dense or sparse trajectories as users get them, and their `.npz` file.

Letters: N points, T frames. Positions are raster pixels `(x, y)` of the original video, queries
`(t, y, x)`.
"""

import io
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from omni.errors import OmniError
from omni.maths import rescale
from omni.system import check_archive, require_memory, write_atomic

__all__ = ["ENTRY_BYTES", "Tracks", "frame_rate", "frame_size", "load_queries", "read_arrays"]

FORMAT_VERSION = 1

ENTRY_BYTES = 20
"""Memory that one point in one frame takes when a file is read, whatever types it is stored in."""


@dataclass(frozen=True)
class Tracks:
    """Positions of points at every time, their visibility and their uncertainty.

    Attributes:
        tracks: (N, T, 2) float32 x, y.
        visible: (N, T) bool, thresholded for the best Average Jaccard.
        visibility: (N, T) float32 probability that the point is visible.
        sigma: (N, T) float32 standard deviation of the position per axis, pixels.
        query_points: (N, 3) float32 t, y, x.
        size: (H, W) of the original video.
        fps: frames per second.
    """

    tracks: np.ndarray
    visible: np.ndarray
    visibility: np.ndarray
    sigma: np.ndarray
    query_points: np.ndarray
    size: tuple[int, int]
    fps: float

    def to_bytes(self) -> bytes:
        """The uncompressed `.npz`. Same tracks give the same bytes."""
        arrays: dict[str, Any] = {
            "tracks": self.tracks.astype(np.float32),
            "visible": self.visible.astype(bool),
            "visibility": self.visibility.astype(np.float32),
            "sigma": self.sigma.astype(np.float32),
            "query_points": self.query_points.astype(np.float32),
            "size": np.asarray(self.size, np.int64),
            "fps": np.float64(self.fps),
            "format_version": np.int64(FORMAT_VERSION),
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    def save(self, path: Path | str) -> None:
        """Write the `.npz` atomically.

        Raises:
            OmniError: the file cannot be written.
        """
        write_atomic(Path(path), self.to_bytes())

    def subset(self, index: slice | np.ndarray) -> "Tracks":
        """The tracks of some points."""
        arrays = ("tracks", "visible", "visibility", "sigma", "query_points")
        return replace(self, **{name: getattr(self, name)[index] for name in arrays})

    def resized(self, size: tuple[int, int]) -> "Tracks":
        """The same tracks in pixels of a frame of another `size` (H, W)."""
        points = self.query_points.copy()
        points[:, :0:-1] = rescale(points[:, :0:-1], self.size, size)
        return replace(
            self,
            tracks=rescale(self.tracks, self.size, size),
            sigma=self.sigma * np.float32(size[0] / self.size[0]),
            query_points=points,
            size=size,
        )

    @classmethod
    def load(cls, path: Path | str) -> "Tracks":
        """Read a `tracks.npz`.

        Raises:
            OmniError: no such file, no `.npz`, a newer format, arrays missing or of other shapes.
        """
        data = read_arrays(path, ("tracks", "visible", "query_points", "size"))
        version = data.get("format_version", np.int64(FORMAT_VERSION))
        if version.shape == () and version > FORMAT_VERSION:
            raise OmniError(
                f"{path} was written in format {version}, this omni reads {FORMAT_VERSION}: use "
                "the omni that wrote it"
            )
        tracks, visible, points = data["tracks"], data["visible"], data["query_points"]
        require_memory(ENTRY_BYTES * visible.size, f"{path}, unpacked,", "use fewer tracks at once")
        sigma = data.get("sigma", np.full(visible.shape, np.nan, np.float32))
        visibility = data.get("visibility", visible)
        if (
            tracks.ndim != 3
            or tracks.shape[2] != 2
            or not (visible.shape == visibility.shape == sigma.shape == tracks.shape[:2])
            or points.shape != (len(tracks), 3)
        ):
            raise OmniError(
                f"{path}: tracks must be (N, T, 2), visible, visibility and sigma (N, T), "
                "query_points (N, 3)"
            )
        return cls(
            tracks=tracks.astype(np.float32),
            visible=visible.astype(bool),
            visibility=visibility.astype(np.float32),
            sigma=sigma.astype(np.float32),
            query_points=points.astype(np.float32),
            size=frame_size(path, data["size"]),
            fps=frame_rate(path, data),
        )


def load_queries(path: Path | str) -> np.ndarray:
    """`query_points` (N, 3) float32 `(t, y, x)` of an `.npz`.

    Raises:
        OmniError: as `read_arrays`, or another shape, or values that are not finite.
    """
    points = read_arrays(path, ("query_points",))["query_points"]
    if points.ndim != 2 or points.shape[1] != 3:
        raise OmniError(f"{path}: query_points must be of shape (N, 3), t y x")
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
    if not np.isfinite(points).all():
        raise OmniError(f"{path}: query_points holds values that are not finite")
    return points


def frame_size(path: Path | str, values: np.ndarray) -> tuple[int, int]:
    """(H, W) of an untrusted array.

    Raises:
        OmniError: not two numbers that can be the size of a frame.
    """
    sides = np.ravel(values)
    if len(sides) != 2 or not (np.isfinite(sides) & (sides >= 1) & (sides < 1 << 16)).all():
        raise OmniError(f"{path}: size must be the height and width of the frames in pixels")
    return int(sides[0]), int(sides[1])


def frame_rate(path: Path | str, arrays: dict[str, np.ndarray]) -> float:
    """`fps` of untrusted arrays; 24 where it is missing.

    Raises:
        OmniError: not one positive number.
    """
    fps = np.ravel(arrays.get("fps", 24.0))
    if len(fps) != 1 or not 0 < fps[0] < 1e6:
        raise OmniError(f"{path}: fps must be a positive number")
    return float(fps[0])


def read_arrays(path: Path | str, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every array of real numbers or booleans in an untrusted `.npz`; text in it is left out.

    The size declared by an array's header must be exactly that of its file in the archive, and all
    arrays together must fit in memory, before anything is unpacked.

    Raises:
        OmniError: no such file, no readable `.npz`, or a `required` array is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise OmniError(f"{path} does not exist: give the path of an .npz file")
    arrays = {}
    try:
        with check_archive(path) as archive:
            for member in archive.infolist():
                array = _read_array(archive, member)
                if array is not None:
                    arrays[member.filename.removesuffix(".npy")] = array
    except OmniError:
        raise
    except Exception as error:  # a damaged or hostile archive can fail anywhere in its readers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OmniError(f"{path} is not a readable .npz of plain arrays ({reason})") from None
    missing = [name for name in required if name not in arrays]
    if missing:
        held = f"{', '.join(arrays)!r:.200}"
        raise OmniError(f"{path} lacks {', '.join(missing)} (it holds {held})")
    return arrays


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray | None:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            header = np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        held = member.file_size - file.tell()
    if dtype.kind in "SU":
        return None
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"{member.filename} holds {dtype}, not numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{member.filename} promises {shape} {dtype} in {held} bytes")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
