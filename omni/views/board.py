"""TensorBoard: what a run writes while it works, and the server that shows it.

Event files live in RUN/tensorboard. Only built-in tabs are used (Scalars, Images, Text, Mesh), so
that any TensorBoard can show them, also a shared one.
"""

import contextlib
import errno
import io
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard import program
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from omni.errors import OmniError
from omni.views.pictures import animation_png

__all__ = ["Board", "serve", "table_markdown", "yaml_markdown"]

_MAX_POINTS = 20_000


class Board:
    """Writes summaries into one folder; they reach the disk within ten seconds.

    Args:
        folder: where the event file goes, RUN/tensorboard; made where missing.
        purge_step: on resume, the first step written again: whatever an earlier session wrote
            from there on is no longer shown, so that no curve is drawn twice. None adds to it.

    Raises:
        OmniError: the folder cannot be written.
    """

    def __init__(self, folder: Path | str, purge_step: int | None = None):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if purge_step is None and not _has_events(Path(folder)):
                # TensorBoard ignores the first session start it reads, so the first session has
                # to mark one too, or the mark of the resumed one would be ignored.
                purge_step = 0
            self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)
        except OSError as error:
            raise OmniError(
                f"cannot write TensorBoard files to {folder} ({error.strerror}): "
                "choose another run folder with -o"
            ) from None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point on the curve of each name; `a/b` puts curve b into group a."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a picture, (h, w, 3) uint8 RGB."""
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
        self._encoded(tag, buffer.getvalue(), step)

    def animation(
        self, tag: str, frames: Sequence[np.ndarray], step: int, fps: float = 12.0
    ) -> None:
        """Show moving frames, (T, h, w, 3) uint8 RGB, as an animated picture under Images.

        `SummaryWriter.add_video` needs a package that no longer works with it; browsers play the
        PNG or GIF of `animation_png`, at most 2 MB, just as well.
        """
        self._encoded(tag, animation_png(frames, fps), step)

    def _encoded(self, tag: str, data: bytes, step: int) -> None:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
        image = Summary.Image(encoded_image_string=data, height=height, width=width, colorspace=3)
        writer: Any = self._writer.file_writer  # declared as None, its value after closing
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Show Markdown text; see `yaml_markdown` and `table_markdown`."""
        self._writer.add_text(tag, markdown, step)

    def points(self, tag: str, vertices: np.ndarray, colors: np.ndarray, step: int) -> None:
        """Show a coloured point cloud that can be turned, at most 20,000 points of it.

        Args:
            tag: name; the steps of one tag become a slider.
            vertices: (N, 3) x right, y down, z away from the viewer, any unit; points that are
                not finite are left out.
            colors: (N, 3) uint8 RGB.
            step: training step, or video frame.
        """
        rows = np.flatnonzero(np.isfinite(vertices).all(1))
        if not len(rows):
            return
        if len(rows) > _MAX_POINTS:
            # Evenly spaced over the rows, so that the same points are kept at every step.
            rows = rows[np.linspace(0, len(rows) - 1, _MAX_POINTS).astype(np.int64)]
        # The viewer's y points up and its z towards the eye.
        upright = np.asarray(vertices, np.float32)[rows] * np.array([1, -1, -1], np.float32)
        # Its default points are specks; as large as their spacing they close to a surface.
        low, high = np.percentile(upright, (5, 95), axis=0)
        size = float(max((high - low).max(), 1e-6) / np.sqrt(len(rows)))
        self._writer.add_mesh(
            tag,
            torch.from_numpy(upright)[None],
            torch.from_numpy(np.asarray(colors, np.uint8)[rows])[None],
            config_dict={"material": {"cls": "PointsMaterial", "size": size}},
            global_step=step,
        )

    def close(self) -> None:
        """Write out what is waiting and close the file."""
        self._writer.close()


def yaml_markdown(text: str) -> str:
    """YAML `text` as a Markdown code block."""
    return f"```yaml\n{text.rstrip()}\n```"


def table_markdown(rows: Mapping[str, Any], header: tuple[str, str] = ("quantity", "value")) -> str:
    """Names and values as a two-column Markdown table; floats with four significant digits."""
    lines = [header, ("---", "---"), *rows.items()]
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def serve(run: Path | str, port: int = 6006, host: str = "127.0.0.1") -> None:
    """Show a run, or a folder of several runs, in TensorBoard until Ctrl-C; prints the address.

    Args:
        run: a run folder, or a folder with runs somewhere below it.
        port: TCP port; 0 takes a free one.
        host: address to listen on; the default is reachable from this machine only.

    Raises:
        OmniError: no such folder, nothing to show in it, or the port cannot be used.
    """
    folder = _log_folder(Path(run))
    _check_address(host, port)
    # Its start-up chatter, on several loggers, would bury the address.
    logging.disable(logging.INFO)
    board = program.TensorBoard()
    board.configure(
        logdir=str(folder.resolve()),
        port=port,
        host=host,
        # By default 10 pictures are kept per tag: too few to see a fit develop.
        samples_per_plugin={"images": 100},
        # The Python loader fails on the Images tab of a run resumed before its last pictures.
        load_fast="auto",
    )
    # Where it can, TensorBoard takes its faster loader and prints how to disable it with a flag
    # that this command does not have.
    with contextlib.redirect_stderr(io.StringIO()):
        url = board.launch()
    print(f"TensorBoard shows {run} at {url} (Ctrl-C stops it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass


def _check_address(host: str, port: int) -> None:
    """Bind and let go: TensorBoard itself ends the process on some addresses it cannot use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise OmniError(
                f"port {port} is in use (another TensorBoard?): choose another with --port, "
                "0 takes a free one"
            ) from None
        raise OmniError(
            f"TensorBoard cannot listen on {host} port {port} "
            f"({getattr(error, 'strerror', None) or error}): choose others with --host and --port"
        ) from None


def _log_folder(run: Path) -> Path:
    if not run.is_dir():
        raise OmniError(f"run folder {run} does not exist: make one with `omni optimize VIDEO`")
    folder = run / "tensorboard"
    folder = folder if folder.is_dir() else run
    if not _has_events(folder):
        raise OmniError(
            f"{run} holds no TensorBoard files yet: `omni optimize` and `omni fit` write them"
        )
    return folder


def _has_events(folder: Path) -> bool:
    return next(folder.rglob("events.out.tfevents.*"), None) is not None
