"""Ground truth for evaluation, and tracks that other trackers wrote.

Letters: N points, T frames. Positions are raster pixels `(x, y)` of a frame of `size` (H, W),
queries `(t, y, x)`. All files are untrusted: `.npz` without pickled objects, and TAP-Vid's pickles
through an unpickler that can build nothing but arrays and builtin containers.
"""

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from omni.errors import OmniError
from omni.system import require_memory
from omni.tracking import ENTRY_BYTES, Tracks, frame_rate, frame_size, read_arrays

__all__ = ["Truth", "load_prediction", "load_truth"]


@dataclass(frozen=True)
class Truth:
    """Where points truly are.

    Attributes:
        tracks: (N, T, 2) float32 x, y raster pixels; NaN where not annotated.
        visible: (N, T) bool.
        annotated: (N, T) bool, entries that may be scored.
        query_points: (N, 3) float32 t, y, x.
        size: (H, W) of the frames that the positions refer to.
        mask_area: (T,) float32 object area in pixels, or None. It is present where the points
            are annotated joints (BADJA), whose visibility is not reliable enough to be scored.
    """

    tracks: np.ndarray
    visible: np.ndarray
    annotated: np.ndarray
    query_points: np.ndarray
    size: tuple[int, int]
    mask_area: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        """(N, T) bool: annotated and visible, where positions are scored."""
        return self.visible & self.annotated


def load_truth(source: Path | str) -> Truth:
    """Read ground truth: an `.npz`, or one clip `FILE.pkl:NAME` of a TAP-Vid pickle.

    The `.npz` holds `tracks` (N, T, 2) and `visible` (N, T), the size as `size` (2,) or through
    `video` (T, H, W, 3), and optionally `query_points` (N, 3), `annotated` (N, T), `mask_area`
    (T,). A pickle is a dict or list of clips with normalised `points` (n, T, 2) and `occluded`
    (n, T); clips of a list are named by their index. Where queries are not given, they are the
    first visible position of every track that is ever visible.

    Raises:
        OmniError: no such file or clip, unreadable, arrays missing or of other shapes.
    """
    path, _, name = str(source).rpartition(":")
    if not Path(source).is_file() and path.endswith(".pkl"):
        return _from_pickle(Path(path), name)
    if str(source).endswith(".pkl"):
        return _from_pickle(Path(source), None)
    return _from_npz(Path(source))


def load_prediction(path: Path | str) -> Tracks:
    """Read our own `tracks.npz`, or an `.npz` of CoTracker's arrays, as `Tracks`.

    CoTracker's: `pred_tracks` ([1,] T, N, 2) and `pred_visibility` ([1,] T, N[, 1]), bool or a
    probability, `queries` ([1,] N, 3) as `(t, x, y)`, and the frame `size` (H, W). Its pixel
    centres are integers, ours half-integers, so positions move by 0.5. It has no sigma (NaN).

    Raises:
        OmniError: no such file, unreadable, arrays missing or of other shapes.
    """
    data = read_arrays(path, ())
    if "pred_tracks" not in data:
        return Tracks.load(path)
    for name in ("pred_visibility", "queries", "size"):
        if name not in data:
            raise OmniError(f"{path} lacks {name}: save it beside pred_tracks (size is H, W)")
    tracks = _unbatched(data["pred_tracks"], 3)
    seen = _unbatched(data["pred_visibility"], 2)
    queries = _unbatched(data["queries"], 2)
    if tracks.shape[2:] != (2,) or seen.shape != tracks.shape[:2]:
        raise OmniError(f"{path}: pred_tracks must be (1, T, N, 2), pred_visibility (1, T, N)")
    if queries.shape != (tracks.shape[1], 3):
        raise OmniError(f"{path}: queries must be (1, N, 3), t x y, one for each track")
    require_memory(ENTRY_BYTES * seen.size, f"{path}, unpacked,", "use fewer tracks at once")
    probability = seen.T.astype(np.float32)
    return Tracks(
        tracks=tracks.transpose(1, 0, 2).astype(np.float32) + np.float32(0.5),
        visible=probability > 0.5,
        visibility=probability,
        sigma=np.full(probability.shape, np.nan, np.float32),
        query_points=(queries[:, [0, 2, 1]] + [0, 0.5, 0.5]).astype(np.float32),
        size=frame_size(path, data["size"]),
        fps=frame_rate(path, data),
    )


def _unbatched(array: np.ndarray, dims: int) -> np.ndarray:
    """`array` without a batch axis in front or a channel axis behind, both of length 1."""
    if array.ndim > dims and array.shape[0] == 1:
        array = array[0]
    if array.ndim > dims and array.shape[-1] == 1:
        array = array[..., 0]
    return array if array.ndim == dims else np.empty((0,) * dims)


def _from_npz(path: Path) -> Truth:
    data = read_arrays(path, ("tracks", "visible"))
    if "size" in data and data["size"].size == 2:
        size = data["size"]
    elif "video" in data and data["video"].ndim == 4:
        size = np.array(data["video"].shape[1:3])
    else:
        raise OmniError(f"{path} lacks size: add the frames' height and width as an array (2,)")
    return _checked(
        path,
        data["tracks"],
        data["visible"],
        size,
        annotated=data.get("annotated"),
        query_points=data.get("query_points"),
        mask_area=data.get("mask_area"),
    )


def _from_pickle(path: Path, name: str | None) -> Truth:
    clips = _load_pickle(path)
    if isinstance(clips, list):
        clips = {str(index): clip for index, clip in enumerate(clips)}
    if not isinstance(clips, dict) or not clips:
        raise OmniError(f"{path} is no TAP-Vid pickle: it must hold a dict or list of clips")
    if name is None and len(clips) == 1:
        name = next(iter(clips))
    if name not in clips:
        known = ", ".join(f"{clip!s:.40}" for clip in list(clips)[:8])
        known += ", ..." if len(clips) > 8 else ""
        raise OmniError(f"{path}: choose a clip with {path.name}:NAME, NAME one of {known}")
    clip = clips[name]
    clip = clip if isinstance(clip, dict) else {}
    points, occluded, video = (_array(clip.get(key)) for key in ("points", "occluded", "video"))
    if points is None or occluded is None:
        raise OmniError(f"{path}: clip {name} lacks the arrays points and occluded")
    # Kinetics stores frames as JPEG bytes; 256 is the size at which TAP-Vid scores anyway.
    size = video.shape[1:3] if video is not None and video.ndim == 4 else (256, 256)
    if points.ndim != 3 or points.shape[2] != 2:
        raise OmniError(f"{path}: points of clip {name} must be of shape (N, T, 2)")
    visible: np.ndarray = np.equal(occluded, 0)
    return _checked(path, points * [size[1], size[0]], visible, np.array(size))


def _checked(
    path: Path,
    tracks: np.ndarray,
    visible: np.ndarray,
    sides: np.ndarray,
    annotated: np.ndarray | None = None,
    query_points: np.ndarray | None = None,
    mask_area: np.ndarray | None = None,
) -> Truth:
    size = frame_size(path, sides)
    annotated = np.ones(visible.shape, bool) if annotated is None else annotated
    if (
        tracks.ndim != 3
        or tracks.shape[2] != 2
        or tracks.shape[1] == 0
        or not (visible.shape == annotated.shape == tracks.shape[:2])
    ):
        raise OmniError(f"{path}: tracks must be (N, T, 2), visible and annotated (N, T)")
    require_memory(ENTRY_BYTES * visible.size, f"{path}, unpacked,", "use fewer tracks at once")
    visible, annotated = visible.astype(bool), annotated.astype(bool)
    tracks = tracks.astype(np.float32)
    annotated = annotated & np.isfinite(tracks).all(axis=-1)
    if query_points is None:
        seen = visible & annotated
        keep = seen.any(axis=1)
        tracks, visible, annotated = tracks[keep], visible[keep], annotated[keep]
        first = seen[keep].argmax(axis=1)
        xy = tracks[np.arange(len(first)), first]
        query_points = np.column_stack([first, xy[:, 1], xy[:, 0]])
    length = tracks.shape[1]
    if query_points.shape != (len(tracks), 3):
        raise OmniError(f"{path}: query_points must be (N, 3), t y x, one for each track")
    frames = np.rint(query_points[:, 0])
    if not (np.isfinite(query_points).all() and ((frames >= 0) & (frames < length)).all()):
        raise OmniError(f"{path}: query_points must be finite, with t from 0 to {length - 1}")
    if mask_area is not None and mask_area.shape != (length,):
        raise OmniError(f"{path}: mask_area must hold one area for each of {length} frames")
    area = None if mask_area is None else mask_area.astype(np.float32)
    return Truth(tracks, visible, annotated, query_points.astype(np.float32), size, area)


class _Dtype:
    """A pickled dtype; only plain numbers and booleans."""

    def __init__(self, code: Any, *_: object):
        if not (isinstance(code, str) and re.fullmatch(r"[<>=|]?[biuf?]\d?", code)):
            name = code if isinstance(code, str) else type(code).__name__
            raise pickle.UnpicklingError(f"dtype {name:.40} is not allowed")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """A pickled array, whose state comes after it."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(
        self, data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]
    ) -> "_Array":
        """Take the bytes of the array."""
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order=order)
        return self


def _array(value: Any) -> np.ndarray | None:
    return value.value if isinstance(value, _Array) else None


_LOADERS: dict[int, Callable[[Any], None]] = {**pickle._Unpickler.dispatch}
"""The opcodes of a pickle to the functions that execute them."""


# The C unpickler takes as much memory as a pickle declares (an 8-byte index may declare gigabytes),
# the one in Python only as much as it holds.
class _Unpickler(pickle._Unpickler):
    """Builds arrays of numbers and builtin containers, and nothing else.

    numpy's own constructors are replaced by `_Array` and `_Dtype`: their `__setstate__` does not
    check its input, so that a forged dtype could make numpy follow arbitrary pointers.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.unread = len(data)

    def latin1(self, text: str, encoding: str) -> bytes:
        """Bytes that an old protocol wrote as text; a text of the file serves only once."""
        self.unread -= len(text)
        if encoding != "latin1" or self.unread < 0:
            raise pickle.UnpicklingError("only as many latin1 bytes as the file has are allowed")
        return text.encode("latin1")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**_LOADERS}
    # Hashing tuples nested n deep takes 2^n steps.
    for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT):
        del dispatch[_code[0]]

    def load_bytearray8(self) -> None:
        """Read bytes, without first taking as much memory as the pickle declares."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_build(self) -> None:
        """Set the state of what `find_class` made, and of nothing else."""
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise pickle.UnpicklingError("only arrays may have a state")
        _LOADERS[pickle.BUILD[0]](self)

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        """One entry of a dict, under a name or number."""
        if not isinstance(self.stack[-2], str | int):
            raise pickle.UnpicklingError("keys must be names or numbers")
        _LOADERS[pickle.SETITEM[0]](self)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        """Entries of a dict, under names or numbers."""
        if not all(isinstance(key, str | int) for key in self.stack[::2]):
            raise pickle.UnpicklingError("keys must be names or numbers")
        _LOADERS[pickle.SETITEMS[0]](self)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> Any:
        """The few names that pickled arrays refer to; all others are refused."""
        module = module.replace("numpy._core", "numpy.core")
        # A new function each time: a pickle can set attributes of what it is handed.
        match module, name:
            case "numpy", "dtype":
                return lambda *args: _Dtype(*args)
            case "numpy", "ndarray":
                return None
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy.core.numeric", "_frombuffer":
                return lambda *args: _Array().fill(*args)
            case "_codecs", "encode":
                return lambda *args: self.latin1(*args)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _load_pickle(path: Path) -> Any:
    if not path.is_file():
        raise OmniError(f"{path} cannot be read (no such file): check the path")
    try:
        require_memory(3 * path.stat().st_size, f"{path}", "use a smaller file, or more memory")
        return _Unpickler(path.read_bytes()).load()
    except OmniError:
        raise
    except OSError as error:
        raise OmniError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise OmniError(f"{path} is no TAP-Vid pickle of plain arrays ({error!s:.200})") from None
