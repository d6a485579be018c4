"""A run folder, opened once: its settings, its store, its device, and its answers once fitted.

    RUN/config.yaml    resolved settings        RUN/tracks.npz   the exported grid
    RUN/chains.npz     the same before the fit  RUN/overlay.mp4  RUN/color.mp4  RUN/depth.mp4
    RUN/checkpoint.pt  RUN/tensorboard/         RUN/report.json  what each stage took and reached
    RUN/anchors/       tracks that dense answers start from, by frame

`omni.run.stages` writes these files.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from omni.config import Config, load_config, to_yaml
from omni.errors import OmniError
from omni.field import Field, load_field
from omni.maths import grid_queries
from omni.store import Store
from omni.system import choose_device, locked, make_folder, read_report, write_atomic
from omni.tracking import (
    DenseReader,
    Reader,
    Tracks,
    anchor_grid,
    anchor_stage,
    answer_anchors,
    load_queries,
)

__all__ = ["Run", "held", "load", "new_run", "preprocessed_run"]

log = logging.getLogger(__name__)


class Run:
    """A run folder and its settings; once fitted it gives tracks.

    Made by `omni.load`, and by `omni.optimize`, which returns it.

    Args:
        folder: the run folder.
        config: its settings.
        device: auto, cpu, cuda or cuda:N; default as the settings have it.

    Attributes:
        folder: the run folder.
        config: its settings.
        device: where the field is fitted and evaluated; chosen on first use.
        store: frames, flows and their evidence; opened on first use.
        fitted: the field and its step; read from the checkpoint on first use.
    """

    def __init__(self, folder: Path, config: Config, device: str | None = None):
        self.folder, self.config = folder, config
        self._device = config.device if device is None else device

    @cached_property
    def device(self) -> torch.device:
        """Where the field is fitted and evaluated.

        Raises:
            OmniError: no such device, or it is not available.
        """
        return choose_device(self._device)

    @cached_property
    def store(self) -> Store:
        """Frames, flows and their evidence."""
        return Store.open(self.folder)

    @cached_property
    def fitted(self) -> tuple[Field, int]:
        """The field of the checkpoint and the step it was saved at."""
        path = self.folder / "checkpoint.pt"
        field, _, step = load_field(path, self.store.num_frames, self.device)
        return field, step

    @property
    def steps(self) -> int:
        """Steps of the fit."""
        return self.fitted[1]

    @cached_property
    def reader(self) -> Reader:
        """Tracks and renderings from the flows and the field."""
        return Reader(self.store, self.fitted[0], self.config.output.chunk, self.matches)

    def forget_reader(self) -> None:
        """Drop the reader after its store, field or matches changed; the next use makes another."""
        self.__dict__.pop("reader", None)

    @property
    def matches(self) -> Tracks | None:
        """Another tracker's tracks, where some were imported."""
        path = self.folder / "matches.npz"
        return Tracks.load(path) if path.is_file() else None

    @property
    def report(self) -> dict[str, Any]:
        """Contents of `report.json`."""
        return read_report(self.folder)

    def use_threads(self) -> None:
        """Limit torch to the CPU threads of the settings, for the read-out."""
        if self.config.threads:
            torch.set_num_threads(self.config.threads)

    def write_settings(self) -> None:
        """Write RUN/config.yaml."""
        write_atomic(self.folder / "config.yaml", to_yaml(self.config).encode())

    def queries(self, path: Path | str | None = None) -> np.ndarray:
        """Queries `(N, 3)` t, y, x of an `.npz`; by default the grid of the settings `output`."""
        if path is not None:
            return load_queries(path)
        output = self.config.output
        return grid_queries(self.store.video_size, output.frame, output.grid)

    def tracks(self, query_points: np.ndarray, times: np.ndarray | None = None) -> Tracks:
        """Trajectories of `(N, 3)` queries `(t, y, x)`; see `Reader.tracks`."""
        return self.reader.tracks(query_points, times)

    def dense(self, frame: float = 0, stride: int = 1, exact: bool = False) -> Tracks:
        """Trajectories of every `stride`-th pixel of a frame, row by row; see `pixel_reader`."""
        points = grid_queries(self.store.video_size, frame, stride)
        return self.pixel_reader(frame, len(points), exact).tracks(points)

    def pixel_reader(self, frame: float, count: int, exact: bool = False) -> Reader:
        """The reader that answers `count` pixels spread over one frame.

        From coarse to fine, unless that is slower: where there are fewer pixels than anchors. Only
        whole frames have anchors. With `exact` every pixel is answered among all its candidates.
        """
        anchors = anchor_grid(self.store.size)[0][..., 0].size
        if exact or count <= anchors or frame != int(frame):
            return self.reader
        return self.dense_reader(int(frame))

    def dense_reader(self, frame: int) -> DenseReader:
        """A reader of all pixels of one frame.

        Its anchors are kept in RUN/anchors for the next time; unfinished ones are continued. A
        folder that cannot be written costs only that: a run can be read from anywhere.

        Raises:
            OmniError: nor can a temporary folder be written.
        """
        kept, size, count = (
            self.folder / "anchors" / str(frame),
            self.store.size,
            self.store.num_frames,
        )
        key = self._inputs_of_tracks()
        with TemporaryDirectory() as temporary:
            try:
                make_folder(kept)
                stage = anchor_stage(kept, key, size, count)
            except (OSError, OmniError) as error:
                log.warning("anchors are not kept: %s", error)
                stage = anchor_stage(Path(temporary), key, size, count)
            total = anchor_grid(size)[0][..., 0].size
            with tqdm(total=total, desc="anchors", unit="track", disable=None) as bar:
                anchors = answer_anchors(self.reader, frame, stage, bar.update)
        return DenseReader(self.store, anchors, self.matches)

    def _inputs_of_tracks(self) -> str:
        """Hash of the files that tracks are computed from."""
        names = ("manifest.json", "checkpoint.pt", "matches.npz")
        paths = [self.folder / name for name in names]
        found = [path.read_bytes() if path.is_file() else b"" for path in paths]
        return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in found)).hexdigest()

    def velocity(self, query_points: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Velocities `(N, M, 2)` of queries at `(M,)` real times, original pixels per frame."""
        return self.reader.velocity(query_points, times)

    def at(self, time: float, query_points: np.ndarray | None = None) -> Tracks:
        """Where points are at one, possibly fractional, time in frames: `Tracks` with T = 1.

        `query_points` defaults to the exported grid of the run.
        """
        points = self.queries() if query_points is None else query_points
        return self.reader.tracks(points, np.array([time]))


def load(run: Path | str, device: str = "auto") -> Run:
    """Open a fitted run. Nothing in its folder changes.

    Its settings are those of RUN/config.yaml; where that is missing, those of the fit.

    Args:
        run: the run folder.
        device: auto, cpu, cuda or cuda:N; that of the settings is the fit's.

    Raises:
        OmniError: no such run, not fitted yet, or damaged.
    """
    folder = Path(run)
    store, chosen = Store.open(folder), choose_device(device)
    field, config, step = load_field(folder / "checkpoint.pt", store.num_frames, chosen)
    own = folder / "config.yaml"
    opened = Run(folder, load_config(str(own)) if own.is_file() else config)
    opened.store, opened.device, opened.fitted = store, chosen, (field, step)
    opened.use_threads()
    return opened


@contextmanager
def held(run: Run | Path | str, open_folder: Callable[[Path], Run]) -> Iterator[Run]:
    """Yield an open run as it is; open a folder, and lock it until the end of the block.

    Raises:
        OmniError: of `open_folder`; or another process holds the folder.
    """
    if isinstance(run, Run):
        yield run
        return
    opened = open_folder(Path(run))
    with locked(opened.folder):
        yield opened


def new_run(folder: Path, config: Config | str | None, overrides: Sequence[str]) -> Run:
    """A run in a folder that is made where missing.

    Raises:
        OmniError: bad settings, or the folder cannot be written.
    """
    opened = Run(folder, load_config(_choose_config(folder, config), overrides))
    make_folder(folder)
    return opened


def preprocessed_run(
    folder: Path, config: Config | str | None = None, overrides: Sequence[str] = ()
) -> Run:
    """A run whose store is finished.

    Raises:
        OmniError: bad settings, no such run, not preprocessed yet, or damaged.
    """
    opened = Run(folder, load_config(_choose_config(folder, config), overrides))
    opened.store = Store.open(folder)
    return opened


def _choose_config(run: Path, config: Config | str | None) -> Config | str:
    """`config` where given, else the run's own settings, else the preset for this machine."""
    if config is not None:
        return config
    own = run / "config.yaml"
    if own.is_file():
        return str(own)
    return "default" if torch.cuda.is_available() else "cpu"
