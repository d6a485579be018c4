"""From a run to trajectories: any query at any time, in chunks, with bounded memory.

Letters: N points, T times or frames, M times.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import numpy as np
import torch

from omni.errors import OmniError
from omni.field import Field, global_motion
from omni.maths import (
    REFERENCE_SIDE,
    Camera,
    inside,
    rescale,
)
from omni.store import Store
from omni.system import require_memory, run_in_slices
from omni.tracking.appearance import similarity
from omni.tracking.confidence import Confidence, cues, predict_confidence
from omni.tracking.field_reader import FieldReader
from omni.tracking.fusion import FieldEstimate, Path, fused_path, smoothed_path
from omni.tracking.integration import Chains, integrate
from omni.tracking.landmarks import Landmarks
from omni.tracking.links import Links
from omni.tracking.selection import (
    NUM_CANDIDATES,
    Candidates,
    Selection,
    candidate_features,
    gather_candidates,
    select_candidates,
    trained_network,
)
from omni.tracking.tracks import Tracks

__all__ = ["Reader"]

GATHERED, SCORED = 2**22, 2**19
"""Most positions of candidates that a thread gathers at once, 60 bytes each with the chains behind
them, and scores at once, 500 bytes each."""

POINTS = 1024
"""Most points of which a thread gathers candidates at once: some seconds of work, which bounds the
delay of an interruption. Fewer are slower: each operation on a frame costs some time, however few
the points are, and threads wait for one another at every one."""

THREAD_BYTES = 60 * GATHERED + 500 * SCORED
"""Most memory that a thread needs."""

HALF_STEP = 0.05
"""Frames before and after over which velocities are central differences."""

QUERY_SIGMA = 0.05
"""Standard deviation of the query itself, pixels: it is given, up to rounding."""


class Reader(FieldReader):
    """Tracks of query points from a run's flows and, once fitted, its field.

    Args:
        store: finished preprocessing.
        field: fitted, on its device; None tracks by the chains of flows alone.
        chunk: points or rays processed at once.
        matches: another tracker's tracks on the same frames, used as landmarks.
    """

    def __init__(
        self, store: Store, field: Field | None, chunk: int, matches: Tracks | None = None
    ):
        super().__init__(store, field, chunk)
        self.links, self.landmarks = Links(store), Landmarks(store, matches)
        self._store = store

    @cached_property
    def camera(self) -> Camera:
        """The video's global motion, fitted on first use: rendering needs none."""
        threshold = self._store.meta("evidence")["threshold"]
        return Camera(global_motion(self._store, threshold), self.size)

    def tracks(
        self,
        query_points: np.ndarray,
        times: np.ndarray | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Tracks:
        """Trajectories of points, forward and backward from their query time.

        Args:
            query_points: (N, 3) t, y, x; raster pixels of the original video, t may be fractional.
            times: (T,) times in frames, any real values; None: every frame.
            progress: called with the number of points finished in each chunk.

        Raises:
            OmniError: a query outside the video's time range or frame.
        """
        points = self._checked(query_points)
        times = np.arange(self.num_frames) if times is None else np.asarray(times, np.float64)
        shape = (len(points), len(times))
        require_memory(
            50 * len(points) * len(times),
            f"answering {len(points)} queries at {len(times)} times",
            "ask for fewer at once, or export with --dense",
        )
        xy = np.empty((*shape, 2), np.float32)
        visibility, sigma = np.empty(shape, np.float32), np.empty(shape, np.float32)
        visible = np.empty(shape, bool)

        def track(rows: slice) -> None:
            xy[rows], confidence = self._track_at(points[rows], times)
            visibility[rows], sigma[rows] = confidence.visibility, confidence.sigma
            visible[rows] = confidence.visible
            progress(len(points[rows]))

        self._in_chunks(len(points), track)
        return Tracks(
            tracks=rescale(xy, self.size, self.video_size),
            visible=visible,
            visibility=visibility,
            sigma=sigma * np.float32(self.video_size[0] / self.size[0]),
            query_points=points,
            size=self.video_size,
            fps=self.fps,
        )

    def velocity(self, query_points: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Velocities `(N, M, 2)` of points at `(M,)` real times, original pixels per frame.

        Differences of the tracks over a tenth of a frame, one-sided at the ends of the video.
        Arguments and errors are those of `tracks`.
        """
        times = np.asarray(times, np.float64)
        before = np.maximum(times - HALF_STEP, 0)
        after = np.minimum(times + HALF_STEP, self.num_frames - 1)
        path = self.tracks(query_points, np.concatenate([before, after])).tracks
        first, second = np.split(path, 2, axis=1)
        return (second - first) / (after - before)[:, None].astype(np.float32)

    def chain_cues(self, query_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cues `(N, T, F)` of chains alone, and their paths `(N, T, 2)` in processing pixels.

        See `omni.tracking.confidence`. Arguments and errors are those of `tracks`.
        """
        frames, chains, _ = self._estimates(self._checked(query_points))
        path, values = self._cues(chains, frames)
        return values, path.at(np.arange(self.num_frames))

    def candidates(self, query_points: np.ndarray) -> Iterator[tuple[Candidates, torch.Tensor]]:
        """Candidates and their features, part by part of the points; processing pixels.

        Needs a field. See `omni.tracking.selection`. Arguments and errors are those of `tracks`.
        """
        frames, chains, field = self._estimates(self._checked(query_points))
        assert field is not None
        path = self._fused_path(frames, chains, field)
        for rows in _parts(len(path), min(POINTS, self._points_for(GATHERED))):
            yield from self._candidates_of(frames, chains, field, path, rows)

    def select(self, query_points: np.ndarray) -> Selection:
        """Smoothed positions and predicted confidence in every frame, processing pixels.

        Needs a field. Arguments and errors are those of `tracks`.
        """
        points, parts = self._checked(query_points), list[Selection]()

        def select(rows: slice) -> None:
            frames, chains, field = self._estimates(points[rows])
            assert field is not None
            selected, query = self._selected(frames, chains, field), chains.queries(frames)
            path = smoothed_path(selected.xy, selected.sigma, frames, query, self.camera)
            selected.xy = path.at(np.arange(self.num_frames))
            selected.xy[np.arange(len(frames)), frames] = query
            parts.append(selected)

        self._in_chunks(len(points), select)
        return Selection.joined(parts)

    def _track_points(self, points: np.ndarray, times: np.ndarray) -> tuple[Path, Confidence]:
        """Paths and their confidence in frames from `Path.start` that cover times, processing
        pixels.

        `visible`: the median over three frames of trust, P(visible and within 6 px), exceeds
        TRUST_THRESHOLD; `_track_at` adds the border of the frame.
        """
        frames, chains, field = self._estimates(points)
        if field is None:
            path, values = self._cues(chains, frames)
            return path, predict_confidence(values, min(self.size))
        selected, query = self._selected(frames, chains, field), chains.queries(frames)
        path = smoothed_path(selected.xy, selected.sigma, frames, query, self.camera)
        return path, selected.confidence()

    def _selected(self, frames: np.ndarray, chains: Chains, field: FieldEstimate) -> Selection:
        """The positions selected among all candidates of points, frame by frame."""
        network = trained_network().to(self.device)
        fused = self._fused_path(frames, chains, field)

        def select(rows: slice) -> Selection:
            parts = self._candidates_of(frames, chains, field, fused, rows)
            select_one = partial(select_candidates, network, scale=self._scale)
            return Selection.joined([select_one(features, part) for part, features in parts])

        at_once = min(POINTS, self._points_for(GATHERED))
        return Selection.joined(run_in_slices(select, len(frames), at_once, THREAD_BYTES))

    def _estimates(self, points: np.ndarray) -> tuple[np.ndarray, Chains, FieldEstimate | None]:
        """Whole query frames, and the estimates of flows and field; processing pixels."""
        frames = np.rint(points[:, 0]).astype(int)
        xy, field = self._query_xy(points), None
        if self.field is not None:
            field = self.follow(points, np.arange(self.num_frames))
            between = points[:, 0] != frames
            xy[between] = field.xy[between, frames[between]]

        def chain(rows: slice) -> Chains:
            return integrate(self.links, frames[rows], xy[rows], self.landmarks)

        return frames, Chains.joined(run_in_slices(chain, len(xy), len(xy), THREAD_BYTES)), field

    def _cues(self, chains: Chains, frames: np.ndarray) -> tuple[Path, np.ndarray]:
        """Paths of chains alone, and the cues of their confidence."""
        path = fused_path(chains, frames, self.camera, None)
        appearance = similarity(self.frames, path.at(np.arange(self.num_frames)), frames)
        return path, cues(chains, frames, min(self.size), appearance)

    def _fused_path(self, frames: np.ndarray, chains: Chains, field: FieldEstimate) -> np.ndarray:
        """Positions `(N, T, 2)` of the fused paths of chains and field."""
        return fused_path(chains, frames, self.camera, field).at(np.arange(self.num_frames))

    def _candidates_of(
        self,
        frames: np.ndarray,
        chains: Chains,
        field: FieldEstimate,
        path: np.ndarray,
        rows: slice,
    ) -> Iterator[tuple[Candidates, torch.Tensor]]:
        """Candidates and features of some of the points, part by part."""
        frames, chains, path = frames[rows], chains.subset(rows), path[rows]
        field = FieldEstimate(field.xy[rows], field.visibility[rows])
        candidates = gather_candidates(
            self._store, self.camera, self.landmarks, chains, path, field, frames
        )
        for some in _parts(len(frames), self._points_for(SCORED)):
            part, seen = candidates.subset(some), field.visibility[some]
            yield (
                part,
                candidate_features(part, seen, self.links, self.frames, frames[some], self.device),
            )

    def _points_for(self, positions: int) -> int:
        """Number of points whose candidates have this many positions in all frames together."""
        return positions // (NUM_CANDIDATES * self.num_frames)

    @property
    def _scale(self) -> float:
        """Pixels per unit of length in features: the short side in units of 256."""
        return min(self.size) / REFERENCE_SIDE

    def _track_at(self, points: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, Confidence]:
        """Positions and confidence of a chunk of queries at real times, processing pixels."""
        path, confidence = self._track_points(points, times)
        # Smoothing moves the query a little; it is exact, so the path is moved back to it.
        nearness = np.clip(1 - np.abs(times - points[:, :1]), 0, 1)[..., None]
        correction = self._query_xy(points) - path.each_at(points[:, 0])
        positions = path.at(times) + correction[:, None] * nearness
        before = np.clip(np.floor(times).astype(int), 0, self.num_frames - 2)
        share = np.clip(times - before, 0, 1)

        def interpolate(values: np.ndarray) -> np.ndarray:
            first = before - path.start
            return (1 - share) * values[:, first] + share * values[:, first + 1]

        inbounds = inside(positions, self.size)
        at_query = nearness[..., 0] > 0.999
        sigma = np.where(at_query, QUERY_SIGMA, interpolate(confidence.sigma))
        visibility = np.where(at_query, 1, interpolate(confidence.visibility)) * inbounds
        flags = interpolate(confidence.visible.astype(np.float32)) > 0.5
        visible = (at_query | flags) & inbounds
        return positions, Confidence(visibility, sigma, visible)

    def _query_xy(self, points: np.ndarray) -> np.ndarray:
        """Query positions `(N, 2)` in processing pixels."""
        return rescale(points[:, :0:-1], self.video_size, self.size).astype(np.float32)

    def _checked(self, query_points: np.ndarray) -> np.ndarray:
        """Queries as float32, after their shape and range are checked."""
        points = np.asarray(query_points, dtype=np.float32)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            raise OmniError(f"queries must be finite numbers (N, 3) t y x, got {points.shape}")
        out_of_time = (points[:, 0] < 0) | (points[:, 0] > self.num_frames - 1)
        out_of_frame = ~inside(points[:, :0:-1], self.video_size)
        for invalid, what in ((out_of_time, "time"), (out_of_frame, "frame")):
            if invalid.any():
                which = int(np.flatnonzero(invalid)[0])
                height, width = self.video_size
                raise OmniError(
                    f"query {which} {points[which].tolist()} (t, y, x) lies outside the {what}: "
                    f"the video has frames 0 to {self.num_frames - 1} of {width}x{height}"
                )
        return points


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows, `size` at most and one at least."""
    step = max(1, size)
    return (slice(start, start + step) for start in range(0, count, step))
