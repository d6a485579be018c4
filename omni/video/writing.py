"""Writing H.264 video that every browser plays."""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from omni.errors import OmniError
from omni.system import sync_folder
from omni.video.source import check_size, open_video

__all__ = ["check_codecs", "write_video"]


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
                check_size(f"{path}: a frame to write", frame.shape[:2], (height, width))
                send(np.ascontiguousarray(np.pad(frame, padding, mode="edge")))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except _CannotWrite as error:
        raise OmniError(f"cannot write {path} ({error}): check the free disk space") from None
    finally:
        temporary.unlink(missing_ok=True)


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


def check_codecs() -> None:
    """Write a small H.264 video and read it back.

    Raises:
        OmniError: one of the two fails.
    """
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, iter(frames), 10.0)
        for _ in open_video(path):
            pass
