"""From a video to a finished store: frames, masks, flow, evidence; each resumable and cached.

A stage's key hashes its input's key and the settings it depends on, so that running again skips
what is finished, continues what was interrupted, and redoes only what a change touches.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from omni.config import Config
from omni.errors import OmniError
from omni.maths import decode_flow, pack_evidence, processing_size
from omni.store import UNKNOWN, Store
from omni.system import Stage, available_memory, digest
from omni.video import VideoSource, load_masks, open_video
from preprocess.estimate import Arrays, estimate_cost, fitting_workers, require_space
from preprocess.evidence import (
    MATCHES,
    NOISE,
    assess,
    calibrated,
    corrected,
    find_cuts,
    find_features,
    gap_statistics,
    key_pairs,
    match,
)
from preprocess.flow import FlowProvider, accepts, compute_flows, resolve_provider, schedule
from preprocess.parallel import progress_bar, run_items, worker_count

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

Labels = dict[int, np.ndarray]
"""Object mask `(H, W)` uint8 by frame."""

Fill = Callable[[Stage, tqdm], None]
"""Writes the arrays of a stage and advances its progress bar."""


def prepare(
    video: Path | str,
    run: Path | str,
    config: Config,
    masks: Path | str | None = None,
    progress: bool = True,
) -> Store:
    """Everything the fit needs from a video, in the run folder's store (see `omni.store`).

    May be stopped at any moment and called again: it continues to the same bytes as a run
    without interruption.

    Args:
        video: video file or folder of frames.
        run: run folder, made if missing.
        config: the settings in `data` and `flow` matter here, and `device`.
        masks: object masks of some or all frames; see `omni.video.load_masks`.
        progress: whether to show progress bars on a terminal.

    Raises:
        OmniError: unreadable video or masks, fewer than 2 frames, RAFT without weights, or too
            little disk space.
    """
    source = open_video(video, config.data.start, config.data.stop, config.data.stride)
    if source.num_frames < 2:
        raise OmniError(f"{video} has {source.num_frames} selected frame(s): at least 2 are needed")
    labels = None if masks is None else load_masks(masks, source)
    store = Store.create(run)
    job = _Job(source, store, config, labels, progress)
    job.drop_outdated_stages()
    job.check_resources()
    job.write_frames()
    job.write_masks()
    job.write_flow()
    job.write_evidence()
    job.write_landmarks()
    store.check()
    return store


class _Job:
    """One call of `prepare`: its inputs, the shapes of its arrays and the keys of its stages."""

    def __init__(
        self,
        source: VideoSource,
        store: Store,
        config: Config,
        labels: Labels | None,
        progress: bool,
    ):
        self.source, self.store, self.config, self.labels = source, store, config, labels
        self.progress = progress
        self.size = processing_size(source.size, config.data.resolution)
        self.provider = self._provider()
        self.keys = self._keys()

    def _provider(self) -> FlowProvider | None:
        """Resolved early, so that missing weights show before any work; None if not needed."""
        if self.store.has("flow") and accepts(self.config.flow, self._finished_provider()):
            if self.store.has("flow", self._flow_key(self._finished_provider())):
                return None
        return resolve_provider(self.config.flow, self.config.device)

    def _finished_provider(self) -> str:
        """Name of the provider of the flow that is in the store."""
        return self.store.meta("flow").get("provider", "")

    def _frames_key(self) -> str:
        return digest("frames", self.source.fingerprint, self.size)

    def _flow_key(self, provider: str) -> str:
        flow = self.config.flow
        return digest("flow", self._frames_key(), provider, flow.pairs, flow.max_gap)

    def _keys(self) -> dict[str, str]:
        """Hash of inputs and settings of each stage, by its name."""
        frames = self._frames_key()
        masks = digest("masks", frames, _checksums(self.labels)) if self.labels else ""
        name = self.provider.name if self.provider else self._finished_provider()
        flow = self._flow_key(name)
        sigma = NOISE, calibrated(name, [1, 2, 4, 8, 16, 32])
        evidence = digest("evidence", flow, masks, self.config.flow.cycle_threshold, sigma)
        landmarks = digest("landmarks", frames)
        names = {"frames": frames, "masks": masks, "flow": flow, "evidence": evidence}
        return names | {"landmarks": landmarks}

    def _arrays(self, cuts: Sequence[int] = ()) -> Arrays:
        """Shape and dtype of every array that the store will hold, by the name of its stage."""
        num_pairs = len(self._pairs(cuts))
        num_keys = len(key_pairs(self.source.num_frames, cuts))
        shape = (self.source.num_frames, *self.size)
        arrays: Arrays = {
            "frames": ((*shape, 3), np.uint8),
            "flow": ((num_pairs, *self.size, 2), np.int16),
            "evidence": ((num_pairs, *self.size), np.uint8),
            "landmarks": ((num_keys, MATCHES, 4), np.float32),
        }
        return arrays | ({"masks": (shape, np.uint8)} if self.labels else {})

    def _pairs(self, cuts: Sequence[int] = ()) -> np.ndarray:
        """Scheduled pairs `(K, 2)`, none across a cut."""
        flow = self.config.flow
        return schedule(self.source.num_frames, flow.pairs, flow.max_gap, cuts)

    def drop_outdated_stages(self) -> None:
        """Drop stages made from other inputs, so that an interrupted run never mixes the two."""
        stages = self.store.manifest["stages"]
        outdated = [n for n, key in self.keys.items() if n in stages and stages[n]["key"] != key]
        for name in outdated:
            del stages[name]
        if outdated:
            self.store.note()

    def check_resources(self) -> None:
        """Log what the work will cost; refuse if the disk cannot hold it. Cuts only lower it."""
        arrays = self._arrays()
        done = {n: self.store.has(n, key) for n, key in self.keys.items()}
        missing = {n: a for n, a in arrays.items() if not done[n]}
        require_space(self.store.folder, missing)
        if self.provider:
            self._limit_workers(self.provider)
            first, second = (self._shrink(image) for image in islice(self.source, 2))
            images, video = (first, second), self.source.size
            cost = estimate_cost(images, video, self._pairs(), missing, self.provider)
            count, (height, width) = self.source.num_frames, self.size
            logger.info("preprocessing %d frames at %dx%d: %s", count, height, width, cost)

    def _limit_workers(self, provider: FlowProvider) -> None:
        """Let as many threads compute flow as memory holds."""
        wanted = provider.workers
        fitting = fitting_workers(wanted, self.size, self.source.size, available_memory())
        if fitting < wanted:
            logger.warning("memory holds %d of %d threads of flow", fitting, wanted)
            provider.workers = fitting

    def _shrink(self, image: np.ndarray) -> np.ndarray:
        return cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA)

    def _write(self, name: str, items: int, fill: Fill, cuts: Sequence[int] = ()) -> None:
        """Run `fill` inside the stage `name`, unless it is finished.

        Args:
            name: the stage's.
            items: number of independently resumable items.
            fill: what writes them.
            cuts: first frames of new shots, for the shapes of arrays of pairs.
        """
        key = self.keys[name]
        if self.store.has(name, key):
            return
        arrays = {name: self._arrays(cuts)[name]}
        with self.store.stage(name, key, arrays, items) as stage:
            with progress_bar(name, items, int(stage.done.sum()), self.progress) as bar:
                fill(stage, bar)

    def write_frames(self) -> None:
        """Decode, shrink and store the frames; find the cuts between them."""

        def fill(stage: Stage, bar: tqdm) -> None:
            frames = stage.arrays["frames"]
            for t, image in enumerate(self.source):
                if not stage.done[t]:
                    frames[t] = self._shrink(image)
                    stage.mark(t)
                    bar.update()
            stage.meta["cuts"] = find_cuts(frames)

        self._write("frames", self.source.num_frames, fill)
        facts: dict[str, dict[str, Any]] = {
            "source": {"name": self.source.path.name, "fingerprint": self.source.fingerprint},
            "video": {
                "size": list(self.source.size),
                "fps": self.source.fps,
                "num_frames": self.source.num_frames,
            },
        }
        if any(self.store.manifest.get(name) != fact for name, fact in facts.items()):
            self.store.note(**facts)

    def write_masks(self) -> None:
        """Store the masks at processing size; frames without one are unknown everywhere."""
        labels = self.labels
        if not labels:
            return

        def fill(stage: Stage, bar: tqdm) -> None:
            for t in range(self.source.num_frames):
                mask = labels.get(t, np.full(self.source.size, UNKNOWN, np.uint8))
                stage.arrays["masks"][t] = cv2.resize(
                    mask, self.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
                )
                stage.mark(t)
                bar.update()

        self._write("masks", self.source.num_frames, fill)

    def write_flow(self) -> None:
        """Compute the flow of all scheduled pairs within a shot."""
        cuts = self._cuts()
        if cuts:
            logger.info("cuts before frames %s", ", ".join(map(str, cuts)))
        pairs = self._pairs(cuts)

        def fill(stage: Stage, bar: tqdm) -> None:
            assert self.provider is not None  # only finished flow needs none
            compute_flows(self.store.frames, pairs, self.provider, stage, bar)
            stage.meta.update(pairs=pairs.tolist(), provider=self.provider.name)

        self._write("flow", len(pairs), fill, cuts)

    def write_evidence(self) -> None:
        """Check every flow against its reverse; note sigma and statistics of every gap."""
        pairs, flow = self.store.pairs, self.store.flow
        masks = self.store.masks if self.labels else None
        threshold = self.config.flow.cycle_threshold
        index = {(int(i), int(j)): k for k, (i, j) in enumerate(pairs)}

        def fill(stage: Stage, bar: tqdm) -> None:
            evidence = stage.arrays["evidence"]

            def work(group: Sequence[int]) -> None:
                for k in group:
                    i, j = map(int, pairs[k])
                    both = decode_flow(flow[k]), decode_flow(flow[index[j, i]])
                    labels = None if masks is None else (masks[i], masks[j])
                    evidence[k] = pack_evidence(assess(*both, threshold, labels))

            workers = worker_count(self.config.flow.workers)
            run_items(stage, [range(len(pairs))], work, workers, bar)
            sigma = corrected(self.store, evidence, threshold)
            stage.meta.update(
                threshold=threshold,
                sigma={str(g): line for g, line in sigma.items()},
                gaps=gap_statistics(evidence, pairs, threshold),
            )

        self._write("evidence", len(pairs), fill, self._cuts())

    def write_landmarks(self) -> None:
        """Match features between the key frames of a shot."""
        cuts = self._cuts()
        pairs = key_pairs(self.source.num_frames, cuts)
        if len(pairs) == 0:
            return

        def fill(stage: Stage, bar: tqdm) -> None:
            found = {t: find_features(self.store.frames[t]) for t in np.unique(pairs).tolist()}
            stage.arrays["landmarks"][:] = np.nan
            for p, (i, j) in enumerate(pairs.tolist()):
                stage.arrays["landmarks"][p] = match(found[i], found[j])
                stage.mark(p)
                bar.update()
            stage.meta["pairs"] = pairs.tolist()

        self._write("landmarks", len(pairs), fill, cuts)

    def _cuts(self) -> list[int]:
        """First frames of new shots, as found when the frames were written."""
        return self.store.meta("frames")["cuts"]


def _checksums(labels: Labels) -> list[list[int]]:
    """Frame and CRC-32 of every mask."""
    return [[t, zlib.crc32(np.ascontiguousarray(labels[t]).data)] for t in sorted(labels)]
