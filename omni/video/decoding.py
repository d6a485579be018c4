"""Video files through PyAV: what they hold, and their frames as displayed RGB images."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from omni.errors import OmniError
from omni.system import available_memory, require_memory

__all__ = ["decode_rgb", "probe"]

_PIXEL_BYTES = 12
"""Memory per pixel of a frame while it is decoded and converted."""

_log = logging.getLogger(__name__)


def probe(path: Path, stop: int = 0) -> tuple[int, tuple[int, int], float]:
    """Decode a file once: the header of a truncated file declares more frames than it holds.

    Damage is reported once, through logging.

    Args:
        path: the video file.
        stop: do not look beyond this many frames; 0 reads all.

    Returns:
        number of frames (at most `stop`), (H, W) as displayed, average frames per second (0 where
        the file does not declare it).

    Raises:
        OmniError: not a video, or nothing in it can be decoded.
    """
    size, stamps = None, []
    for frame in _decode(path, stop, warn=True):
        size = size or _displayed_size(frame)
        stamps.append(frame.pts)
    if size is None:
        raise OmniError(f"{path} is not a readable video (no frame decodes): give another file")
    return len(stamps), size, _frame_rate(path, stamps)


def decode_rgb(path: Path, selected: range) -> Iterator[tuple[int, np.ndarray]]:
    """Decode the `selected` frame numbers to `(number, (H, W, 3) uint8 RGB)`, as displayed.

    Always decodes from the start: seeking is not frame-exact in every container.

    Raises:
        OmniError: not a video.
    """
    for number, frame in enumerate(_decode(path, selected[-1] + 1)):
        if number in selected:
            image = frame.to_ndarray(format="rgb24")
            yield number, np.ascontiguousarray(np.rot90(image, _quarter_turns(frame)))


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    try:
        # The whitelist keeps playlists disguised as videos from reaching the network.
        container = av.open(
            str(path.absolute()),
            options={"protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OmniError(f"{path} is not a readable video ({reason}): give another file") from None
    with container:
        # FFmpeg draws plain text as a terminal screen; that is never meant.
        if not container.streams.video or container.format.name == "tty":
            raise OmniError(f"{path} holds no video: give another file")
        codec = container.streams.video[0].codec_context
        if codec is None:
            raise OmniError(f"{path} is coded in a way that FFmpeg does not know: convert it")
        pixels = codec.width * codec.height
        require_memory(_PIXEL_BYTES * pixels, f"a frame of {path}", "use a smaller video")
        # Frames may grow on the way.
        most = min(available_memory() // _PIXEL_BYTES, (1 << 31) - 1)
        codec.options = {"max_pixels": str(most)}
        container.streams.video[0].thread_type = "AUTO"
        yield container


def _decode(path: Path, stop: int, warn: bool = False) -> Iterator[av.VideoFrame]:
    """Frames in display order, at most `stop` (0: all); what cannot be decoded is left out."""
    count, last, damaged = 0, None, False
    with _open(path) as container:
        for frames in _decode_packets(container, container.streams.video[0]):
            damaged |= frames is None
            for frame in frames or ():
                yield frame
                count, last = count + 1, frame
                if count == stop:
                    return
        if warn and (damaged or _breaks_off(container, count, last)):
            _log.warning(
                "%s is damaged or breaks off: using the %d frames that decode", path, count
            )


def _decode_packets(
    container: InputContainer, stream: VideoStream
) -> Iterator[list[av.VideoFrame] | None]:
    """Frames that each packet completes, None where it is damaged; the last drains the decoder."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield _decode_packet(stream, packet)
    except av.FFmpegError:
        yield None
    yield _decode_packet(stream, None)


def _decode_packet(stream: VideoStream, packet: av.Packet | None) -> list[av.VideoFrame] | None:
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError:
        return None


# Timestamps count in the stream's time base: frames drained from the decoder lack `frame.time`.


def _breaks_off(container: InputContainer, count: int, last: av.VideoFrame | None) -> bool:
    """Whether the header declares more: frames where it counts them, else a longer duration."""
    stream = container.streams.video[0]
    duration, unit = container.duration, stream.time_base
    if stream.frames or last is None or last.pts is None or duration is None or unit is None:
        return count < stream.frames - 2  # edit lists hide a frame or two of an intact file
    return last.pts * unit < 0.9 * duration / av.time_base


def _frame_rate(path: Path, stamps: list[int | None]) -> float:
    """Average rate of the container, unless the timestamps contradict it."""
    with _open(path) as container:
        stream = container.streams.video[0]
        declared, unit = float(stream.average_rate or 0), float(stream.time_base or 0)
    known = [stamp for stamp in stamps if stamp is not None]
    span = (known[-1] - known[0]) * unit if known else 0
    measured = (len(known) - 1) / span if span > 0 else 0
    return declared if math.isclose(declared, measured, rel_tol=0.01) else measured or declared


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns from the stored to the displayed frame."""
    return round(frame.rotation / 90) % 4


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    turned = _quarter_turns(frame) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)
