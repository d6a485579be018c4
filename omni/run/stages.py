"""The stages of a run as functions of it; `optimize` runs them all.

Every stage takes an open `Run`, or a folder, which it then opens itself. What is finished with the
same inputs and settings is skipped, so calling a stage again continues it.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from omni.config import Config, load_config
from omni.errors import OmniError
from omni.evaluation import Method, baseline, load_prediction
from omni.field import Trainer, fit_key, fit_progress
from omni.maths import grid_queries
from omni.run.folder import Run, held, load, new_run, preprocessed_run
from omni.store import Store
from omni.system import locked, make_folder, refuse_folder, timed, torch_threads
from omni.tracking import Reader, Tracks, load_queries, long_tracks, write_dense
from omni.video import write_video
from omni.views import Summaries, draw_tracks, render_videos

__all__ = [
    "answer_anchors",
    "export",
    "fit",
    "import_matches",
    "make_trainer",
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
) -> Run:
    """One video to dense tracks: preprocess, fit, answer anchors, export, visualise.

    All of it goes into one run folder. Anchors are the coarse grid that `Run.dense` starts from.

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
    folder = default_folder(video, run)
    with held(folder, lambda folder: new_run(folder, config, overrides)) as opened:
        preprocess_video(video, opened, masks=masks)
        if matches is not None:
            import_matches(opened, matches)
        _integrate_chains(opened)
        fit(opened)
        answer_anchors(opened)
        export(opened, opened.folder / "tracks.npz")
        visualize(opened)
    return opened


def preprocess_video(
    video: Path | str,
    run: Run | Path | str,
    config: Config | str | None = None,
    overrides: Sequence[str] = (),
    masks: Path | str | None = None,
) -> Run:
    """Frames, flows, consistency and masks into the run's store; arguments as `optimize`.

    Raises:
        OmniError: as `optimize`.
    """
    from preprocess import prepare

    with held(run, lambda folder: new_run(folder, config, overrides)) as opened:
        folder = opened.folder
        with timed(folder, "preprocess") as record:
            store = _without_video(Path(video), opened)
            opened.write_settings()
            opened.store = store or prepare(video, folder, opened.config, masks)
            opened.forget_reader()
            record["pairs"] = len(opened.store.pairs)
            record["store_bytes"] = sum(f.stat().st_size for f in opened.store.folder.iterdir())
    return opened


def fit(
    run: Run | Path | str, config: Config | str | None = None, overrides: Sequence[str] = ()
) -> None:
    """The optimisation alone, on a preprocessed run; continues a checkpoint of the same fit.

    Args:
        run: preprocessed run, or its folder; left alone where its fit is finished.
        config: as in `optimize`; only for a folder, as are `overrides`.
        overrides: `section.key=value` texts laid over it.

    Raises:
        OmniError: bad settings, no such run, not preprocessed yet, damaged, or in use.
    """
    opened = run if isinstance(run, Run) else preprocessed_run(Path(run), config, overrides)
    store, settings, device = opened.store, opened.config, opened.device
    matches = opened.matches
    if matches is not None and not settings.sampling.tracks:
        log.warning("imported matches are not used: sampling.tracks is 0")
    checkpoint = opened.folder / "checkpoint.pt"
    step, finished = fit_progress(checkpoint, fit_key(store, settings, _hash(matches)))
    if finished:
        log.info("the fit is finished")
        return
    # Its operations are so small that threads spend their time waiting for each other, and many
    # times more where another process needs a core.
    with (
        locked(opened.folder),
        torch_threads(settings.threads or 1),
        timed(opened.folder, "fit") as record,
        Summaries(opened.folder / "tensorboard", settings, step) as summaries,
    ):
        opened.write_settings()
        trainer = make_trainer(store, settings, checkpoint, device, matches)
        trainer.on_scalars, trainer.on_images = summaries.scalars, summaries.images
        trainer.run()
        record["steps"] = trainer.step
        record["held_out"] = trainer.history
        record["rollbacks"] = trainer.rollbacks
        if trainer.diverged:
            log.warning("the fit stopped at step %d: its loss kept diverging", trainer.step)
    opened.fitted = trainer.field.eval(), trainer.step
    opened.forget_reader()


def make_trainer(
    store: Store,
    config: Config,
    checkpoint: Path,
    device: torch.device,
    matches: Tracks | None = None,
) -> Trainer:
    """A trainer for a store, supervised by its flows, its integrated chains and imported tracks."""
    tracks = long_tracks(store, matches) if config.sampling.tracks else None
    return Trainer(store, config, checkpoint, device, tracks, _hash(matches))


def _hash(matches: Tracks | None) -> str:
    return "" if matches is None else hashlib.sha256(matches.to_bytes()).hexdigest()


def import_matches(run: Run | Path | str, path: Path | str) -> None:
    """Copy another tracker's tracks into a preprocessed run, for its later fits and read-outs.

    Raises:
        OmniError: unreadable, or made on other frames.
    """
    with held(run, preprocessed_run) as opened:
        store, tracks = opened.store, load_prediction(path)
        if tracks.tracks.shape[1] != store.num_frames:
            raise OmniError(
                f"{path} holds tracks over {tracks.tracks.shape[1]} frames but the video has "
                f"{store.num_frames}: track the same frames"
            )
        tracks.resized(store.video_size).save(opened.folder / "matches.npz")
        opened.forget_reader()


def answer_anchors(run: Run | Path | str) -> None:
    """Track the anchors of the frame `output.frame` into RUN/anchors (see `Run.dense_reader`).

    Raises:
        OmniError: no such run, not fitted, damaged, or in use.
    """
    with held(run, load) as opened, timed(opened.folder, "anchors"):
        opened.dense_reader(opened.config.output.frame)


def export(
    run: Run | Path | str,
    path: Path | str,
    queries: Path | str | np.ndarray | None = None,
    frame: int | None = None,
    grid: int | None = None,
    dense: bool = False,
    exact: bool = False,
    times: np.ndarray | None = None,
) -> None:
    """Write trajectories of a fitted run to an `.npz` (see docs/data_format.md).

    Args:
        run: fitted run, or its folder, which is only read.
        path: file to write.
        queries: an `.npz` with `query_points` (N, 3) t y x in original pixels, or the array.
        frame: frame of the grid; default `output.frame`.
        grid: stride of the grid in original pixels; default `output.grid`, with `dense` 1.
        dense: store every grid pixel as (H', W', T, 2), streamed with bounded memory.
        exact: with `dense`, select each pixel's track among all its candidates.
        times: times in frames of the exported positions; default every frame.

    Raises:
        OmniError: no such run, not fitted, damaged; bad queries; or the file cannot be written.
    """
    path = Path(path)
    refuse_folder(path)
    opened = run if isinstance(run, Run) else load(run)
    output = opened.config.output
    frame = output.frame if frame is None else frame
    make_folder(path.parent)
    with timed(opened.folder, "export"):
        if dense:
            points = grid_queries(opened.store.video_size, frame, grid or 1)
            reader = opened.pixel_reader(frame, len(points), exact)
            write_dense(reader, path, frame, grid or 1, times)
            return
        if queries is None:
            points = grid_queries(opened.store.video_size, frame, grid or output.grid)
        else:
            points = queries if isinstance(queries, np.ndarray) else load_queries(queries)
        with tqdm(total=len(points), desc="export", unit="track", disable=None) as bar:
            opened.reader.tracks(points, times, bar.update).save(path)


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

    Raises:
        OmniError: bad input, settings or environment.
    """
    folder = default_folder(video, run)
    with held(folder, lambda folder: new_run(folder, config, overrides)) as opened:
        preprocess_video(video, opened, masks=masks)
        return _integrate_chains(opened, queries)


def _integrate_chains(run: Run, queries: Path | str | None = None) -> Path:
    """Write RUN/chains.npz, the tracks of integrated flows alone."""
    path, points = run.folder / "chains.npz", run.queries(queries)
    run.use_threads()
    with timed(run.folder, "chains") as record:
        reader = Reader(run.store, None, run.config.output.chunk, run.matches)
        tracks = reader.tracks(points)
        tracks.save(path)
        record["visible"] = round(float(tracks.visible.mean()), 4)
        record["median_sigma"] = round(float(np.median(tracks.sigma)), 3)
    return path


def track_baseline(
    run: Path | str, path: Path | str, method: Method, queries: Path | str | None = None
) -> None:
    """Write the tracks of a baseline that follows a run's flows (see `omni.evaluation.baseline`).

    Raises:
        OmniError: not preprocessed, damaged; bad queries; or the file cannot be written.
    """
    refuse_folder(Path(path))
    opened = preprocessed_run(Path(run))
    baseline(opened.store, opened.queries(queries), method).save(path)


def visualize(run: Run | Path | str) -> None:
    """Write overlay, colour and depth videos and the final TensorBoard summaries of a run.

    Raises:
        OmniError: no such run, not fitted, damaged, in use, or it cannot be written.
    """
    with held(run, load) as opened:
        folder, store, output = opened.folder, opened.store, opened.config.output
        if not (folder / "tracks.npz").is_file():
            export(opened, folder / "tracks.npz")
        tracks = Tracks.load(folder / "tracks.npz")
        with timed(folder, "visualize"):
            shown = _overlay_tracks(opened, tracks)
            write_video(folder / "overlay.mp4", draw_tracks(store.frames, shown), store.fps)
            render_videos(
                opened.reader, folder, store.fps, output.render_side, output.render_frames
            )
            with Summaries(folder / "tensorboard", opened.config) as summaries:
                summaries.results(opened.steps, store, shown, opened.report)


def _without_video(video: Path, run: Run) -> Store | None:
    """The finished store of a video that is gone since; None where the video is there.

    Raises:
        OmniError: it is gone, and the run was not preprocessed to the end with these settings.
    """
    if video.exists():
        return None
    own = run.folder / "config.yaml"
    if own.is_file() and (run.folder / "manifest.json").is_file():
        store, before = Store.open(run.folder), load_config(str(own))
        same = (before.data, before.flow) == (run.config.data, run.config.flow)
        source = store.manifest.get("source")
        if same and isinstance(source, dict) and source.get("name") == video.name:
            log.warning("%s is gone: continuing with its frames in %s", video, run.folder)
            return store
    raise OmniError(f"{video} does not exist: give a video file or a folder of frames")


def default_folder(video: Path | str, run: Path | str | None) -> Path:
    """The run folder of a video, `runs/NAME` unless given; by default never outside of `runs`."""
    name = Path(video).absolute().stem.strip(". ")
    return Path("runs") / (name or "video") if run is None else Path(run)


def _overlay_tracks(run: Run, tracks: Tracks) -> Tracks:
    """The tracks to draw: at most about 800, a regular subset of the exported ones."""
    every = max(1, round(np.sqrt(len(tracks.tracks) / 800)))
    if every == 1 or len(np.unique(tracks.query_points[:, 0])) > 1:
        return tracks
    stride = run.config.output.grid * every
    frame = int(tracks.query_points[0, 0])
    return run.dense_reader(frame).tracks(grid_queries(run.store.video_size, frame, stride))
