"""Reading and writing video: files and folders of frames as streams of RGB frames, and masks.

Nothing here holds a whole clip in memory: a `VideoSource` can be iterated any number of times and
decodes on the way. Frame numbers are positions in the file or folder, counted from 0; *selected*
indices count the frames that `start`, `stop` and `stride` leave.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from omni.decoding import decode_rgb, probe
from omni.errors import OmniError
from omni.files import sync_folder
from omni.images import image_size, list_images, read_image, read_mask
from omni.memory import require_memory

__all__ = ["VideoSource", "load_masks", "open_video", "write_video"]

FOLDER_FPS = 24.0

_MEGABYTE = 1 << 20
_MOST_LABELS = 64


@dataclass(frozen=True)
class VideoSource:
    """A selected range of frames; iterate to decode `(H, W, 3)` uint8 RGB, as often as needed.

    Attributes:
        path: the file or folder.
        size: (H, W) of every frame, as displayed (rotation applied).
        frames: the frame numbers selected.
        fps: frames per second of the selected sequence.
        fingerprint: hash of content and selection; survives moving and touching the file.
        names: for a folder the image files of the selected frames, for a file empty.
    """

    path: Path
    size: tuple[int, int]
    frames: range
    fps: float
    fingerprint: str
    names: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        """Number of selected frames."""
        return len(self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decode the selected frames in order.

        Raises:
            OmniError: a frame cannot be decoded, has another size, or is gone since opening.
        """
        if self.names:
            decoded = ((name, read_image(self.path / name)) for name in self.names)
        else:
            decoded = decode_rgb(self.path, self.frames)
        count = 0
        for name, image in decoded:
            _check_size(f"{self.path}: frame {name}", image.shape[:2], self.size)
            count += 1
            yield image
        if count != len(self):
            raise OmniError(f"{self.path} changed while it was read: run the command again")


def open_video(path: Path | str, start: int = 0, stop: int = 0, stride: int = 1) -> VideoSource:
    """Open a video file (anything PyAV reads, also of variable frame rate) or folder of images.

    A file is decoded once to count its frames: containers promise more than truncated files hold.

    Args:
        path: video file, or folder of jpg/png images taken in natural order (2 before 10).
        start: first frame number.
        stop: frame number to stop before; 0 reads to the end.
        stride: take every stride-th frame; divides `fps`.

    Raises:
        OmniError: no such path, no video, no images, images of different sizes, a range outside
            the video or with fewer than 2 frames.
    """
    path = Path(path)
    if start < 0 or 0 != stop <= start or stride < 1:
        raise OmniError(
            f"frames {start}:{stop}:{stride} of {path}: start must not be negative, stop must lie "
            "after start (or be 0: the end), stride must be at least 1"
        )
    if path.is_dir():
        return _open_folder(path, start, stop, stride)
    if path.is_file():
        return _open_file(path, start, stop, stride)
    raise OmniError(f"{path} does not exist: give a video file or a folder of frames")


def load_masks(path: Path | str, source: VideoSource) -> dict[int, np.ndarray]:
    """Object masks of some or all frames.

    A folder's masks belong to the frame of the same file name where `source` is a folder, else to
    the frame of that number (complete sequences may count from 1), else to frames in order. A
    single file belongs to the frame of its name or number, else to the first selected frame.
    Indexed images are labels, 255 unknown; grey images holding only 0 and 255 become 0 and 1.

    Args:
        path: folder of masks or one mask.
        source: the video they belong to.

    Returns:
        selected index to (H, W) uint8 labels, 0 background, at the size of the video.

    Raises:
        OmniError: no such path, unreadable, another size than the video, or no frame fits.
    """
    path = Path(path)
    if path.is_dir():
        files = list_images(path)
        numbers = _match_folder([file.stem for file in files], source)
    elif path.is_file():
        files, numbers = [path], [_match_single(path.stem, source)]
    else:
        raise OmniError(f"{path} does not exist: give a mask or a folder of masks")
    chosen = [pair for pair in zip(files, numbers, strict=True) if pair[1] in source.frames]
    height, width = source.size
    needed = 2 * len(chosen) * height * width  # as read, and as labels
    require_memory(needed, f"reading the masks in {path}", "give masks of fewer frames")
    raw = {}
    for file, number in chosen:
        index = source.frames.index(number)
        raw[index] = read_mask(file)
        _check_size(f"mask {file}", raw[index][0].shape, source.size)
    if not raw:
        raise OmniError(
            f"no mask in {path} belongs to a selected frame of {source.path}: name each mask like "
            "its frame (or by its frame number)"
        )
    return _as_labels(raw)


def write_video(path: Path | str, frames: Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Write an H.264 (yuv420p) mp4 that browsers play, atomically.

    Args:
        path: the file to make or replace.
        frames: (h, w, 3) uint8 RGB each; odd sizes are padded by repeating the last row/column.
        fps: frames per second.
        crf: x264 quality, 0 lossless to 51 worst.

    Raises:
        OmniError: no frames, frames of different sizes, or the file cannot be written.
    """
    path, frames = Path(path), iter(frames)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OmniError(f"cannot write {path}: give a file name in a folder that can be written")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.mp4")
    temporary.unlink(missing_ok=True)  # it may lead elsewhere
    first = next(frames, None)
    if first is None:
        raise OmniError(f"cannot write {path}: there are no frames")
    height, width = first.shape[:2]
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    try:
        with _encoder(temporary, (width + width % 2, height + height % 2), fps, crf) as send:
            for frame in itertools.chain([first], frames):
                _check_size(f"{path}: a frame to write", frame.shape[:2], (height, width))
                send(np.ascontiguousarray(np.pad(frame, padding, mode="edge")))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except _CannotWrite as error:
        raise OmniError(f"cannot write {path} ({error}): check the free disk space") from None
    finally:
        temporary.unlink(missing_ok=True)


def _select(path: Path, total: int, start: int, stop: int, stride: int) -> range:
    if start >= total or stop > total:
        raise OmniError(
            f"{path} has {total} frames, but start is {start} and stop is {stop}: stay within them"
        )
    frames = range(start, stop or total, stride)
    if len(frames) < 2:
        raise OmniError(
            f"{path}: fewer than 2 frames are selected (start {start}, stop {stop or total}, "
            f"stride {stride}): select more"
        )
    return frames


def _check_size(what: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if tuple(size) != tuple(expected):
        raise OmniError(
            f"{what} is {size[1]}x{size[0]} pixels, but the video is {expected[1]}x{expected[0]}: "
            "all must have one size"
        )


def _fingerprint(files: Iterable[Path], names: tuple[str, ...], frames: range) -> str:
    """Hash of the selection, the names, and the size, first and last megabyte of each file."""
    digest = hashlib.sha256(repr((frames, names)).encode())
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}:".encode() + file.read(_MEGABYTE))
            file.seek(max(file.tell(), size - _MEGABYTE))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _open_folder(path: Path, start: int, stop: int, stride: int) -> VideoSource:
    files = list_images(path)
    frames = _select(path, len(files), start, stop, stride)
    files = [files[number] for number in frames]
    size = image_size(files[0])
    for file in files:
        _check_size(f"{path}: frame {file.name}", image_size(file), size)
    names = tuple(file.name for file in files)
    fingerprint = _fingerprint(files, names, frames)
    return VideoSource(path, size, frames, FOLDER_FPS / stride, fingerprint, names)


def _open_file(path: Path, start: int, stop: int, stride: int) -> VideoSource:
    total, size, fps = probe(path, stop)
    frames = _select(path, total, start, stop, stride)
    fingerprint = _fingerprint([path], (), frames)
    return VideoSource(path, size, frames, (fps or FOLDER_FPS) / stride, fingerprint)


class _CannotWrite(Exception):
    """The encoder failed, not the code that makes the frames."""


@contextmanager
def _encoder(path: Path, size: tuple[int, int], fps: float, crf: int) -> Iterator[Callable]:
    """Yield a function that encodes one more frame of `size` (W, H)."""
    # Tagged BT.709, so that every player turns the colours back the same way.
    colour = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    convert = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-movflags", "+faststart"]
    writer = imageio_ffmpeg.write_frames(
        str(path.absolute()),
        size,
        fps=fps,
        codec="libx264",
        macro_block_size=2,
        ffmpeg_log_level="quiet",
        output_params=["-crf", str(crf), *convert, *colour],
    )

    def send(frame: np.ndarray | None) -> None:
        try:
            writer.send(frame)
        except (OSError, RuntimeError) as error:
            raise _CannotWrite(" ".join(str(error).split())[-200:]) from None

    send(None)
    try:
        yield send
    finally:
        writer.close()
    if not path.is_file():
        raise _CannotWrite("the encoder wrote nothing")


# Masks


def _match_folder(stems: list[str], source: VideoSource) -> list[int]:
    """Frame number of every mask of a folder, -1 where there is none."""
    if source.names:
        return [_number_of_name(stem, source) for stem in stems]
    numbers = [_trailing_number(stem) for stem in stems]
    count = len(numbers)
    from_one = numbers == list(range(1, count + 1)) and count > source.frames[-1]
    return list(range(count)) if None in numbers or from_one else numbers


def _match_single(stem: str, source: VideoSource) -> int:
    number = _number_of_name(stem, source)
    if not source.names and stem.isdecimal():
        number = int(stem)
    return number if number in source.frames else source.frames[0]


def _number_of_name(stem: str, source: VideoSource) -> int:
    stems = [Path(name).stem for name in source.names]
    return source.frames[stems.index(stem)] if stem in stems else -1


def _trailing_number(stem: str) -> int | None:
    digits = re.search(r"\d+$", stem, re.ASCII)
    return int(digits.group()) if digits else None


def _as_labels(masks: dict[int, tuple[np.ndarray, bool]]) -> dict[int, np.ndarray]:
    """Turn grey masks into labels; decided over all of them, since one may lack the object.

    Grey levels are labels unless they are only 0 and 255, or so many (antialiasing, jpeg) that
    they can only be a binary mask with soft edges.
    """
    levels = {int(v) for mask, indexed in masks.values() if not indexed for v in np.unique(mask)}
    binary = levels <= {0, 255} or len(levels) > _MOST_LABELS
    return {
        index: (mask > 127).astype(np.uint8) if binary and not indexed else mask
        for index, (mask, indexed) in masks.items()
    }
