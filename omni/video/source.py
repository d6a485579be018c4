"""Reading video: files and folders of frames as streams of RGB frames.

Nothing here holds a whole clip in memory: a `VideoSource` can be iterated any number of times and
decodes on the way. Frame numbers are positions in the file or folder, counted from 0; *selected*
indices count the frames that `start`, `stop` and `stride` leave.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni.errors import OmniError
from omni.video.decoding import decode_rgb, probe
from omni.video.images import image_size, list_images, read_image

__all__ = ["VideoSource", "check_size", "open_video"]

FOLDER_FPS = 24.0

_MEGABYTE = 1 << 20


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
        decoded: Iterator[tuple[str | int, np.ndarray]]
        if self.names:
            decoded = ((name, read_image(self.path / name)) for name in self.names)
        else:
            decoded = decode_rgb(self.path, self.frames)
        count = 0
        for name, image in decoded:
            check_size(f"{self.path}: frame {name}", image.shape[:2], self.size)
            count += 1
            yield image
        if count != len(self):
            raise OmniError(f"{self.path} changed while it was read: run the command again")


def open_video(path: Path | str, start: int = 0, stop: int = 0, stride: int = 1) -> VideoSource:
    """Open a video file (anything PyAV reads, also of variable frame rate) or folder of images.

    A file is decoded once to count its frames, since the header of a truncated file declares more
    than it holds.

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


def check_size(what: str, size: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Check that a picture is as large as the video's.

    Raises:
        OmniError: it is not; the message starts with `what`.
    """
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
        check_size(f"{path}: frame {file.name}", image_size(file), size)
    names = tuple(file.name for file in files)
    fingerprint = _fingerprint(files, names, frames)
    return VideoSource(path, size, frames, FOLDER_FPS / stride, fingerprint, names)


def _open_file(path: Path, start: int, stop: int, stride: int) -> VideoSource:
    total, size, fps = probe(path, stop)
    frames = _select(path, total, start, stop, stride)
    fingerprint = _fingerprint([path], (), frames)
    return VideoSource(path, size, frames, (fps or FOLDER_FPS) / stride, fingerprint)
