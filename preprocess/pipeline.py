"""From a video to a finished store: frames, masks, flow, evidence; each resumable and cached.

A stage's key hashes its input's key and the settings it depends on, so that running again skips
what is finished, continues what was interrupted, and redoes only what a change touches.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from omni.config import Config, digest
from omni.coords import processing_size
from omni.errors import OmniError
from omni.memory import available_memory
from omni.store import UNKNOWN, Store, decode_flow, pack_evidence, unpack_evidence
from omni.video import VideoSource, load_masks, open_video
from preprocess.consistency import assess, gap_statistics
from preprocess.cuts import find_cuts
from preprocess.estimate import estimate_cost, fitting_workers, require_space
from preprocess.features import MATCHES, find_features, key_pairs, match
from preprocess.flow import FlowProvider, accepts, compute_flows, resolve_provider
from preprocess.pairs import schedule
from preprocess.parallel import progress_bar, run_items, worker_count
from preprocess.sigma import NOISE, calibrated, corrected

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

_STAGES = {"doubt": "flow"}  # arrays written by a stage of another name


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
    job = _Job(source, Store.create(run), config, labels, progress)
    job.forget_outdated()
    job.announce()
    job.write_frames()
    job.write_masks()
    job.write_flow()
    job.write_evidence()
    job.write_landmarks()
    return Store.open(run)


class _Job:
    """One `prepare`: its inputs, the size of its arrays and the keys of its stages."""

    def __init__(
        self,
        source: VideoSource,
        store: Store,
        config: Config,
        labels: dict[int, np.ndarray] | None,
        show: bool,
    ):
        self.source, self.store, self.config, self.labels = source, store, config, labels
        self.show = show
        self.size = processing_size(source.size, config.data.resolution)
        self.provider = self._provider()
        self.keys = self._keys()

    def _provider(self) -> FlowProvider | None:
        """Resolved early, so that missing weights show before any work; None if not needed."""
        if self.store.has("flow") and accepts(self.config.flow, self._finished_provider()):
            if self.store.has("flow", self._flow_key(self._finished_provider())):
                return None
        return resolve_provider(self.config.flow, self.config.device)

    def _finished_provider(self):
        return self.store.meta("flow").get("provider", "")

    def _frames_key(self):
        return digest("frames", self.source.fingerprint, self.size)

    def _flow_key(self, provider):
        flow = self.config.flow
        return digest("flow", self._frames_key(), provider, flow.pairs, flow.max_gap)

    def _keys(self):
        frames = self._frames_key()
        masks = digest("masks", frames, _checksums(self.labels)) if self.labels else ""
        name = self.provider.name if self.provider else self._finished_provider()
        flow = self._flow_key(name)
        sigma = NOISE, calibrated(name, [1, 2, 4, 8, 16, 32])
        evidence = digest("evidence", flow, masks, self.config.flow.cycle_threshold, sigma)
        landmarks = digest("landmarks", frames)
        names = {"frames": frames, "masks": masks, "flow": flow, "evidence": evidence}
        return names | {"landmarks": landmarks}

    def _arrays(self, cuts=()):
        num_pairs = len(self._pairs(cuts))
        num_keys = len(key_pairs(self.source.num_frames, cuts))
        shape = (self.source.num_frames, *self.size)
        arrays = {
            "frames": ((*shape, 3), np.uint8),
            "flow": ((num_pairs, *self.size, 2), np.int16),
            "evidence": ((num_pairs, *self.size), np.uint8),
            "landmarks": ((num_keys, MATCHES, 4), np.float32),
        }
        if self.provider and self.provider.judges:
            arrays["doubt"] = arrays["evidence"]
        return arrays | ({"masks": (shape, np.uint8)} if self.labels else {})

    def _pairs(self, cuts=()):
        flow = self.config.flow
        return schedule(self.source.num_frames, flow.pairs, flow.max_gap, cuts)

    def forget_outdated(self) -> None:
        """Drop stages made from other inputs, so that an interrupted run never mixes the two."""
        stages = self.store.manifest["stages"]
        outdated = [n for n, key in self.keys.items() if n in stages and stages[n]["key"] != key]
        for name in outdated:
            del stages[name]
        if outdated:
            self.store.note()

    def announce(self) -> None:
        """Say what the work will cost; refuse if the disk cannot hold it. Cuts only lower it."""
        arrays = self._arrays()
        done = {n: self.store.has(n, key) for n, key in self.keys.items()}
        missing = {n: a for n, a in arrays.items() if not done[_STAGES.get(n, n)]}
        require_space(self.store.folder, missing)
        if self.provider:
            asked, video = self.provider.workers, self.source.size
            fitting = fitting_workers(asked, self.size, video, available_memory())
            if fitting < asked:
                logger.warning("memory holds %d of %d threads of flow", fitting, asked)
                self.provider.workers = fitting
            images = tuple(self._shrink(image) for image in islice(self.source, 2))
            cost = estimate_cost(images, self.source.size, self._pairs(), missing, self.provider)
            count, (height, width) = self.source.num_frames, self.size
            logger.info("preprocessing %d frames at %dx%d: %s", count, height, width, cost)

    def _shrink(self, image):
        return cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA)

    def _write(self, name: str, items: int, fill: Callable, cuts: Sequence[int] = ()) -> None:
        """Run `fill(stage, bar)` inside the stage `name`, unless it is finished."""
        key = self.keys[name]
        if self.store.has(name, key):
            return
        arrays = self._arrays(cuts)
        arrays = {n: a for n, a in arrays.items() if _STAGES.get(n, n) == name}
        with self.store.stage(name, key, arrays, items) as stage:
            with progress_bar(name, items, int(stage.done.sum()), self.show) as bar:
                fill(stage, bar)

    def write_frames(self) -> None:
        """Decode, shrink and store the frames; find the cuts between them."""

        def fill(stage, bar):
            frames = stage.arrays["frames"]
            for t, image in enumerate(self.source):
                if not stage.done[t]:
                    frames[t] = self._shrink(image)
                    stage.mark(t)
                    bar.update()
            stage.meta["cuts"] = find_cuts(frames)

        self._write("frames", self.source.num_frames, fill)
        facts = {
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
        if not self.labels:
            return

        def fill(stage, bar):
            for t in range(self.source.num_frames):
                mask = self.labels.get(t, np.full(self.source.size, UNKNOWN, np.uint8))
                stage.arrays["masks"][t] = cv2.resize(
                    mask, self.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
                )
                stage.mark(t)
                bar.update()

        self._write("masks", self.source.num_frames, fill)

    def write_flow(self) -> None:
        """Flow of all pairs within a shot."""
        cuts = self.store.meta("frames")["cuts"]
        if cuts:
            logger.info("cuts before frames %s", ", ".join(map(str, cuts)))
        pairs = self._pairs(cuts)

        def fill(stage, bar):
            compute_flows(self.store.frames, pairs, self.provider, stage, bar)
            stage.meta.update(pairs=pairs.tolist(), provider=self.provider.name)

        self._write("flow", len(pairs), fill, cuts)

    def write_evidence(self) -> None:
        """Check every flow against its reverse, and say per gap how well they agree."""
        pairs, flow, doubt = self.store.pairs, self.store.flow, self.store.doubt
        masks = self.store.masks if self.labels else None
        threshold = self.config.flow.cycle_threshold
        index = {(int(i), int(j)): k for k, (i, j) in enumerate(pairs)}

        def fill(stage, bar):
            evidence = stage.arrays["evidence"]

            def work(group):
                for k in group:
                    i, j = map(int, pairs[k])
                    both = decode_flow(flow[k]), decode_flow(flow[index[j, i]])
                    labels = None if masks is None else (masks[i], masks[j])
                    doubted = None if doubt is None else unpack_evidence(doubt[k])
                    evidence[k] = pack_evidence(assess(*both, threshold, labels, doubted))

            workers = worker_count(self.config.flow.workers)
            run_items(stage, [range(len(pairs))], work, workers, bar)
            sigma = corrected(self.store, evidence, threshold)
            stage.meta.update(
                threshold=threshold,
                sigma={str(g): line for g, line in sigma.items()},
                gaps=gap_statistics(evidence, pairs, threshold),
            )

        self._write("evidence", len(pairs), fill, self.store.meta("frames")["cuts"])

    def write_landmarks(self) -> None:
        """Match features between key frames of one shot."""
        cuts = self.store.meta("frames")["cuts"]
        pairs = key_pairs(self.source.num_frames, cuts)
        if len(pairs) == 0:
            return

        def fill(stage, bar):
            found = {t: find_features(self.store.frames[t]) for t in np.unique(pairs).tolist()}
            stage.arrays["landmarks"][:] = np.nan
            for p, (i, j) in enumerate(pairs.tolist()):
                stage.arrays["landmarks"][p] = match(found[i], found[j])
                stage.mark(p)
                bar.update()
            stage.meta["pairs"] = pairs.tolist()

        self._write("landmarks", len(pairs), fill, cuts)


def _checksums(labels):
    return [[t, zlib.crc32(np.ascontiguousarray(labels[t]))] for t in sorted(labels)]
