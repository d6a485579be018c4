"""The stages as functions over a run folder: preprocess, fit, export, visualise, all of them.

    RUN/config.yaml  resolved settings          RUN/tracks.npz    the exported grid
    RUN/chains.npz   the same before the fit    RUN/overlay.mp4   color.mp4  depth.mp4
    RUN/checkpoint.pt  RUN/tensorboard/         RUN/report.json   what each stage took and reached

`optimize` runs them in order and skips what is finished, so calling it again continues.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from omni.checkpoint import is_count, load_checkpoint, load_field
from omni.config import Config, load_config, to_yaml
from omni.coords import grid_queries, rescale
from omni.dense import write_dense
from omni.errors import DamagedError, OmniError
from omni.files import write_atomic
from omni.lock import locked
from omni.overlay import draw_tracks
from omni.readout import Reader
from omni.report import read_report, timed
from omni.store import Store
from omni.summaries import Summaries
from omni.tracks import Tracks, load_queries
from omni.trainer import Trainer, fit_key
from omni.video import write_video
from omni.viz import depth_to_image

__all__ = [
    "Run",
    "choose_config",
    "export",
    "fit",
    "import_matches",
    "load",
    "optimize",
    "preprocess_video",
    "track",
    "track_baseline",
    "visualize",
]

log = logging.getLogger(__name__)


def optimize(
    video: Path | str,
    run: Path | str | None = None,
    config: Config | str | None = None,
    overrides: Sequence[str] = (),
    masks: Path | str | None = None,
    matches: Path | str | None = None,
) -> "Run":
    """One video to dense tracks: preprocess, fit, export, visualise, into one run folder.

    Stages already finished with the same inputs and settings are skipped; an interrupted one
    continues.

    Args:
        video: a video file or a folder of frames.
        run: run folder; default `runs/NAME_OF_VIDEO`.
        config: a Config, a preset's name, or a YAML file; None: the run's own settings if it has
            any, else `default` with a CUDA device and `cpu` without.
        overrides: `section.key=value` texts laid over it.
        masks: folder of per-frame label PNGs, or one mask file.
        matches: tracks of another tracker on the same frames, used as further correspondences.

    Returns:
        The finished run, as `load` gives it.

    Raises:
        OmniError: bad input, settings or environment.
    """
    video = Path(video)
    run = default_run(video) if run is None else Path(run)
    settings = load_config(choose_config(run, config), overrides)
    with locked(run):
        store = preprocess_video(video, run, settings, masks)
        if matches is not None:
            import_matches(run, matches)
        _write_chains(run, store, settings, None)
        fit(run, settings)
        export(run, run / "tracks.npz")
        visualize(run)
    return load(run)


def preprocess_video(
    video: Path | str,
    run: Path | str,
    config: Config | str | None = None,
    masks: Path | str | None = None,
) -> Store:
    """Frames, flows, consistency and masks into the run's store; arguments as `optimize`."""
    from preprocess import prepare

    run = Path(run)
    settings = load_config(choose_config(run, config))
    _make_folder(run)
    with locked(run), timed(run, "preprocess") as record:
        store = _without_video(Path(video), run, settings)
        write_atomic(run / "config.yaml", to_yaml(settings).encode())
        if store is None:
            store = prepare(video, run, settings, masks)
        record["pairs"] = len(store.pairs)
        record["store_bytes"] = sum(f.stat().st_size for f in store.folder.iterdir())
    return store


def fit(run: Path | str, config: Config | str | None = None) -> None:
    """The optimisation alone, on a preprocessed run; continues a checkpoint of the same fit."""
    run = Path(run)
    settings = load_config(choose_config(run, config))
    store = Store.open(run)
    device = _device(settings.device)
    _use_threads(settings.threads)
    checkpoint = run / "checkpoint.pt"
    matches = _matches(run)
    if matches is not None and not settings.sampling.tracks:
        log.warning("imported matches are not used: sampling.tracks is 0")
    step, finished = _progress(checkpoint, fit_key(store, settings, matches))
    if finished:
        log.info("the fit is finished")
        return
    events = run / "tensorboard"
    with (
        locked(run),
        timed(run, "fit") as record,
        Summaries(events, settings, step) as summaries,
    ):
        write_atomic(run / "config.yaml", to_yaml(settings).encode())
        callbacks = summaries.scalars, summaries.images
        trainer = Trainer(store, settings, checkpoint, device, *callbacks, matches)
        trainer.run()
        record["steps"] = trainer.step
        record["held_out"] = trainer.history
        record["rollbacks"] = trainer.rollbacks
        if trainer.gave_up:
            log.warning("the fit stopped at step %d: its loss kept diverging", trainer.step)


def import_matches(run: Path | str, path: Path | str) -> None:
    """Copy another tracker's tracks into a preprocessed run, for its fits and answers from now on.

    Raises:
        OmniError: unreadable, or made on other frames.
    """
    from omni.truth import load_prediction

    store, tracks = Store.open(run), load_prediction(path)
    if tracks.tracks.shape[1] != store.num_frames:
        raise OmniError(
            f"{path} holds tracks over {tracks.tracks.shape[1]} frames but the video has "
            f"{store.num_frames}: track the same frames"
        )
    with locked(Path(run)):
        _resized(tracks, store.video_size).save(Path(run) / "matches.npz")


def export(
    run: Path | str,
    path: Path | str,
    queries: Path | str | np.ndarray | None = None,
    frame: int | None = None,
    grid: int | None = None,
    dense: bool = False,
    times: np.ndarray | None = None,
) -> None:
    """Write trajectories of a fitted run to an `.npz` (see docs/data_format.md).

    Args:
        run: fitted run folder.
        path: file to write.
        queries: an `.npz` with `query_points` (N, 3) t y x in original pixels, or the array.
        frame: frame of the grid; default `output.frame`.
        grid: stride of the grid in original pixels; default `output.grid`, with `dense` 1.
        dense: store every grid pixel as (H', W', T, 2), streamed with bounded memory.
        times: times in frames to answer at; default every frame.
    """
    run, path = Path(run), Path(path)
    _refuse_folder(path)
    opened = load(run)
    frame = opened.config.output.frame if frame is None else frame
    _make_folder(path.parent)
    with timed(run, "export"):
        if dense:
            write_dense(opened.reader, path, frame, grid or 1, times)
            return
        if queries is None:
            stride = grid or opened.config.output.grid
            queries = grid_queries(opened.store.video_size, frame, stride)
        elif not isinstance(queries, np.ndarray):
            queries = load_queries(queries)
        with tqdm(total=len(queries), desc="export", unit="track", disable=None) as bar:
            opened.reader.tracks(queries, times, bar.update).save(path)


def track(
    video: Path | str,
    run: Path | str | None = None,
    config: Config | str | None = None,
    overrides: Sequence[str] = (),
    masks: Path | str | None = None,
    queries: Path | str | None = None,
) -> Path:
    """Tracks from the integrated flows alone, without any fit: seconds after preprocessing.

    Arguments as `optimize`; `queries` as `export`. Returns the `.npz` written,
    `RUN/chains.npz`.
    """
    run = default_run(video) if run is None else Path(run)
    settings = load_config(choose_config(run, config), overrides)
    with locked(run):
        store = preprocess_video(video, run, settings, masks)
        return _write_chains(run, store, settings, queries)


def _write_chains(run: Path, store: Store, config: Config, queries: Path | str | None) -> Path:
    output = config.output
    if queries is None:
        points = grid_queries(store.video_size, output.frame, output.grid)
    else:
        points = load_queries(queries)
    path = run / "chains.npz"
    _use_threads(config.threads)
    with timed(run, "chains") as record:
        tracks = Reader(store, None, output.chunk, _matches(run)).tracks(points)
        tracks.save(path)
        record["visible"] = round(float(tracks.visible.mean()), 4)
        record["median_sigma"] = round(float(np.median(tracks.sigma)), 3)
    return path


def default_run(video: Path | str) -> Path:
    """`runs/NAME`, where nothing else is asked for; never outside of `runs`."""
    name = Path(video).absolute().stem.strip(". ")
    return Path("runs") / (name or "video")


def track_baseline(
    run: Path | str, path: Path | str, method: str, queries: Path | str | None = None
) -> None:
    """Write what following a run's flows alone gives (see `omni.baselines`)."""
    from omni.baselines import baseline

    _refuse_folder(Path(path))
    store = Store.open(run)
    output = load_config(choose_config(run, None)).output
    if queries is None:
        points = grid_queries(store.video_size, output.frame, output.grid)
    else:
        points = load_queries(queries)
    baseline(store, points, method).save(path)


def visualize(run: Path | str) -> None:
    """Write overlay, colour and depth videos and the final TensorBoard summaries of a run."""
    run = Path(run)
    opened = load(run)
    store, output = opened.store, opened.config.output
    tracks_path = run / "tracks.npz"
    if not tracks_path.is_file():
        export(run, tracks_path)
    tracks = Tracks.load(tracks_path)
    with locked(run), timed(run, "visualize"):
        shown = _overlay_tracks(opened, tracks)
        write_video(run / "overlay.mp4", draw_tracks(store.frames, shown), store.fps)
        step = -(-store.num_frames // output.render_frames)
        colors, depths = [], []
        for time_ in tqdm(range(0, store.num_frames, step), desc="render", disable=None):
            color, depth = opened.reader.render(time_, output.render_side)
            colors.append((color * 255).round().astype(np.uint8))
            depths.append(depth)
        write_video(run / "color.mp4", iter(colors), store.fps / step)
        # As one tall picture, so that all frames share one colour scale.
        painted = depth_to_image(np.concatenate(depths)).reshape(len(depths), *colors[0].shape)
        write_video(run / "depth.mp4", iter(painted), store.fps / step)
        with Summaries(run / "tensorboard", opened.config) as summaries:
            summaries.results(opened.steps, store, shown, opened.report)


class Run:
    """A fitted run: answers queries. Made by `omni.load`.

    Attributes:
        folder: the run folder.
        config: its settings.
        store: frames, flows and their evidence.
        report: what each stage took and reached.
    """

    def __init__(self, folder: Path, device: str = "auto"):
        self.folder = folder
        self.store = Store.open(folder)
        path, frames = folder / "checkpoint.pt", self.store.num_frames
        field, self.config, self.steps = load_field(path, frames, _device(device))
        _use_threads(self.config.threads)
        self.reader = Reader(self.store, field, self.config.output.chunk, _matches(folder))

    @property
    def report(self) -> dict[str, Any]:
        """Contents of `report.json`."""
        return read_report(self.folder)

    def tracks(self, query_points: np.ndarray, times: np.ndarray | None = None) -> Tracks:
        """Trajectories of `(N, 3)` queries `(t, y, x)`; see `Reader.tracks`."""
        return self.reader.tracks(query_points, times)

    def dense(self, frame: float = 0, stride: int = 1) -> Tracks:
        """Trajectories of every `stride`-th pixel of a frame, row by row."""
        return self.reader.dense(frame, stride)

    def velocity(self, query_points: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Velocities `(N, M, 2)` of queries at `(M,)` real times, original pixels per frame."""
        return self.reader.velocity(query_points, times)

    def at(self, time: float, query_points: np.ndarray | None = None) -> Tracks:
        """Where points are at one, possibly fractional, time in frames: `Tracks` with T = 1.

        `query_points` defaults to the exported grid of the run.
        """
        if query_points is None:
            output = self.config.output
            query_points = grid_queries(self.store.video_size, output.frame, output.grid)
        return self.reader.tracks(query_points, np.array([time]))


def load(run: Path | str, device: str = "auto") -> Run:
    """Open a fitted run.

    Raises:
        OmniError: no such run, not fitted yet, or damaged.
    """
    return Run(Path(run), device)


def choose_config(run: Path | str, config: Config | str | None) -> Config | str:
    """`config` where given, else the run's own settings, else the preset for this machine."""
    if config is not None:
        return config
    own = Path(run) / "config.yaml"
    if own.is_file():
        return str(own)
    return "default" if torch.cuda.is_available() else "cpu"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OmniError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OmniError(
            "no CUDA device is available: use --set device=cpu, or a CUDA build of torch"
        )
    return device


def _use_threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)


def _without_video(video: Path, run: Path, settings: Config) -> Store | None:
    """The finished store of a video that is gone since; None where the video is there.

    Raises:
        OmniError: it is gone, and the run was not preprocessed to the end with these settings.
    """
    if video.exists():
        return None
    own = run / "config.yaml"
    if own.is_file() and (run / "manifest.json").is_file():
        store, before = Store.open(run), load_config(str(own))
        same = (before.data, before.flow) == (settings.data, settings.flow)
        source = store.manifest.get("source")
        if same and isinstance(source, dict) and source.get("name") == video.name:
            log.warning("%s is gone: going on with its frames in %s", video, run)
            return store
    raise OmniError(f"{video} does not exist: give a video file or a folder of frames")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OmniError(
            f"cannot write into {folder} ({error.strerror}): choose another folder with -o"
        ) from None


def _refuse_folder(path: Path) -> None:
    """Find out that a result cannot be written before it is computed."""
    if path.is_dir():
        raise OmniError(f"{path} is a folder: name a file in it with -o")


def _resized(tracks: Tracks, size: tuple[int, int]) -> Tracks:
    """The same tracks in pixels of a frame of another `size` (H, W)."""
    points = tracks.query_points.copy()
    points[:, :0:-1] = rescale(points[:, :0:-1], tracks.size, size)
    return dataclasses.replace(
        tracks,
        tracks=rescale(tracks.tracks, tracks.size, size),
        sigma=tracks.sigma * np.float32(size[0] / tracks.size[0]),
        query_points=points,
        size=size,
    )


def _matches(run: Path) -> Tracks | None:
    path = run / "matches.npz"
    return Tracks.load(path) if path.is_file() else None


def _progress(checkpoint: Path, key: str) -> tuple[int, bool]:
    """Step a fit of this key has reached, and whether it is finished."""
    if not checkpoint.is_file():
        return 0, False
    try:
        state = load_checkpoint(checkpoint)
    except DamagedError:
        return 0, False
    step, finished = state.get("step"), state.get("finished")
    known = state.get("key") == key and is_count(step) and type(finished) is bool
    return (step, finished) if known else (0, False)


def _overlay_tracks(run: Run, tracks: Tracks) -> Tracks:
    """The tracks to draw: at most about 800, a regular subset of the exported ones."""
    every = max(1, round(np.sqrt(len(tracks.tracks) / 800)))
    if every == 1 or len(np.unique(tracks.query_points[:, 0])) > 1:
        return tracks
    stride = run.config.output.grid * every
    return run.reader.dense(float(tracks.query_points[0, 0]), stride)
