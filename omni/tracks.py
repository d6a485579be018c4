"""`Tracks`: dense or sparse trajectories as they leave the product, and their `.npz` file.

Letters: N points, T frames. Positions are raster pixels `(x, y)` of the original video, queries
`(t, y, x)`.
"""

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from omni.errors import OmniError
from omni.files import write_atomic

__all__ = ["Tracks", "load_queries", "read_arrays"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Tracks:
    """Where points are at every frame, whether they are visible there, and how sure we are.

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
        arrays = {
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
        try:
            write_atomic(Path(path), self.to_bytes())
        except OSError as error:
            raise OmniError(
                f"cannot write {path} ({error.strerror}): choose another folder with -o"
            ) from None

    def subset(self, index: slice | np.ndarray) -> "Tracks":
        """The tracks of some points."""
        arrays = ("tracks", "visible", "visibility", "sigma", "query_points")
        return replace(self, **{name: getattr(self, name)[index] for name in arrays})

    @classmethod
    def load(cls, path: Path | str) -> "Tracks":
        """Read a `tracks.npz`.

        Raises:
            OmniError: no such file, no `.npz`, arrays missing or of other shapes.
        """
        data = read_arrays(path, ("tracks", "visible", "query_points", "size"))
        tracks, visible = data["tracks"], data["visible"]
        points, size = data["query_points"], data["size"].ravel()
        if (
            tracks.ndim != 3
            or tracks.shape[2] != 2
            or visible.shape != tracks.shape[:2]
            or points.shape != (len(tracks), 3)
            or len(size) != 2
        ):
            raise OmniError(
                f"{path}: tracks must be (N, T, 2), visible (N, T), query_points (N, 3), size (2,)"
            )
        visible = visible.astype(bool)
        return cls(
            tracks=tracks.astype(np.float32),
            visible=visible,
            visibility=data.get("visibility", visible).astype(np.float32),
            sigma=data.get("sigma", np.full(visible.shape, np.nan)).astype(np.float32),
            query_points=points.astype(np.float32),
            size=(int(size[0]), int(size[1])),
            fps=float(data.get("fps", 24.0)),
        )


def load_queries(path: Path | str) -> np.ndarray:
    """`query_points` (N, 3) float32 `(t, y, x)` of an `.npz`.

    Raises:
        OmniError: as `read_arrays`, or another shape, or values that are not finite.
    """
    points = read_arrays(path, ("query_points",))["query_points"]
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "fiu":
        raise OmniError(f"{path}: query_points must be numbers of shape (N, 3), t y x")
    if not np.isfinite(points).all():
        raise OmniError(f"{path}: query_points holds values that are not finite")
    return points.astype(np.float32)


def read_arrays(path: Path | str, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every plain array of an untrusted `.npz`; pickled objects are refused.

    Raises:
        OmniError: no such file, no readable `.npz`, or a `required` array is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise OmniError(f"{path} does not exist: give the path of an .npz file")
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise OmniError(f"{path} is not a readable .npz of plain arrays ({error})") from None
    missing = [name for name in required if name not in arrays]
    if missing:
        raise OmniError(f"{path} lacks {', '.join(missing)} (it holds {', '.join(arrays)})")
    return arrays
