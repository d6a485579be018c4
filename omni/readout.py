"""From a run to trajectories: chunked, bounded memory, any query at any time.

Letters: N points, T times, S samples per ray.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch

from omni.appearance import similarity
from omni.camera import REFERENCE_SIDE, Camera, global_motion
from omni.confidence import Judgement, cues, judge, steady
from omni.consensus import THRESHOLD, Verdict, believe, features, joined, trained
from omni.coords import (
    denormalize,
    grid_queries,
    inside,
    normalize,
    pixel_centers,
    processing_size,
    rescale,
)
from omni.errors import OmniError
from omni.fusion import Path, Witness, curve, settle
from omni.integration import Chains, integrate
from omni.landmarks import Landmarks
from omni.links import Links
from omni.memory import out_of_memory, require_memory
from omni.model import Field
from omni.store import Store
from omni.threads import spread
from omni.tracks import Tracks
from omni.witnesses import WITNESSES, Witnesses, call

__all__ = ["Reader"]

log = logging.getLogger(__name__)

SMALLEST_CHUNK = 16

HEARD, WEIGHED = 2**20, 2**19
"""Positions of witnesses that a thread holds at once, 60 bytes each with the chains they come from,
and weighs at once, 500 bytes each: some seconds of work, which is how long an interruption waits.
"""

THREAD_BYTES = 60 * HEARD + 500 * WEIGHED
"""Memory that a thread needs."""

HALF_STEP = 0.05
"""Frames on either side over which velocities are differences."""

QUERY_SIGMA = 0.05
"""Standard deviation of the query itself, pixels: it is given, up to rounding."""


class Reader:
    """Answers queries from a run's flows and, once fitted, its field.

    Args:
        store: finished preprocessing.
        field: fitted, on its device; None reads the chains of flows alone.
        chunk: points or rays handled at once.
        matches: another tracker's tracks on the same frames, further observations.
    """

    def __init__(
        self, store: Store, field: Field | None, chunk: int, matches: Tracks | None = None
    ):
        self.links, self.landmarks = Links(store), Landmarks(store, matches)
        self.field, self.chunk = field, chunk
        self.size, self.video_size, self.fps = store.size, store.video_size, store.fps
        self.num_frames, self.frames = store.num_frames, store.frames
        self._store = store
        self.device = torch.device("cpu") if field is None else next(field.parameters()).device

    @cached_property
    def camera(self) -> Camera:
        """The video's global motion, fitted when the first track asks: pictures need none."""
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
            times: (T,) times in frames to answer at, any real values; None: every frame.
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

        def answer(rows: slice) -> None:
            xy[rows], judged = self._answer(points[rows], times)
            visibility[rows], sigma[rows] = judged.visibility, judged.sigma
            visible[rows] = judged.visible
            progress(len(points[rows]))

        self._in_chunks(len(points), answer)
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
        Arguments and errors as `tracks`.
        """
        times = np.asarray(times, np.float64)
        before = np.maximum(times - HALF_STEP, 0)
        after = np.minimum(times + HALF_STEP, self.num_frames - 1)
        path = self.tracks(query_points, np.concatenate([before, after])).tracks
        first, second = np.split(path, 2, axis=1)
        return (second - first) / (after - before)[:, None].astype(np.float32)

    def _in_chunks(self, total: int, work: Callable[[slice], None]) -> None:
        """Call `work(rows)` for all rows; out of memory, halve the chunk from there on."""
        start = 0
        while start < total:
            try:
                work(slice(start, min(start + self.chunk, total)))
                start += self.chunk
                continue
            except Exception as error:
                if not out_of_memory(error) or self.chunk <= SMALLEST_CHUNK:
                    raise
            self.chunk //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("out of memory: going on in chunks of %d points", self.chunk)

    def dense(self, frame: float, stride: int = 1, times: np.ndarray | None = None) -> Tracks:
        """Trajectories of every `stride`-th pixel of a frame, row by row of the strided grid."""
        return self.tracks(grid_queries(self.video_size, frame, stride), times)

    @torch.no_grad()
    def follow(self, query_points: np.ndarray, times: np.ndarray) -> Witness:
        """What the field alone says: positions in processing pixels, and visibility.

        Args:
            query_points: (N, 3) t, y, x in original pixels.
            times: (T,) times in frames.
        """
        shape = (len(query_points), len(times))
        witness = Witness(np.empty((*shape, 2), np.float32), np.empty(shape, np.float32))
        for index in _same_time(query_points[:, 0], max(1, self.chunk // 4)):
            witness.xy[index], witness.visibility[index] = self._follow(query_points[index], times)
        return witness

    def evidence(self, query_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cues `(N, T, F)` of chains alone (see `omni.confidence`) and their paths `(N, T, 2)`.

        Processing pixels.
        """
        frames, chains, _ = self._accounts(self._checked(query_points))
        path, values = self._cues(chains, frames)
        return values, path.at(np.arange(self.num_frames))

    def testimony(self, query_points: np.ndarray) -> Iterator[tuple[Witnesses, torch.Tensor]]:
        """Witnesses and their features (see `omni.consensus`), part by part of the points.

        Needs a field. Processing pixels.
        """
        accounts = self._accounts(self._checked(query_points))
        path = self._settled(*accounts)
        for rows in _parts(len(path), self._at_once(HEARD)):
            yield from self._hear(*accounts, path, rows)

    def _settle(self, points: np.ndarray) -> tuple[Path, Judgement]:
        """Paths and their judgement in every frame, processing pixels."""
        frames, chains, field = self._accounts(points)
        if field is None:
            path, values = self._cues(chains, frames)
            return path, judge(values, min(self.size))
        network = trained().to(self.device)
        settled = self._settled(frames, chains, field)

        def weigh(rows: slice) -> Verdict:
            heard = self._hear(frames, chains, field, settled, rows)
            return joined([believe(network, part, said, self._scale) for said, part in heard])

        verdict = joined(spread(weigh, len(points), self._at_once(HEARD), THREAD_BYTES))
        path = curve(verdict.xy, verdict.sigma, frames, chains.queries(frames), self.camera)
        visible = steady(verdict.trust) > THRESHOLD
        return path, Judgement(verdict.visibility, verdict.sigma, visible)

    def _accounts(self, points: np.ndarray) -> tuple[np.ndarray, Chains, Witness | None]:
        """Whole query frames, and what flows and field say; processing pixels."""
        frames = np.rint(points[:, 0]).astype(int)
        xy, field = self._given(points), None
        if self.field is not None:
            field = self.follow(points, np.arange(self.num_frames))
            between = points[:, 0] != frames
            xy[between] = field.xy[between, frames[between]]

        def carry(rows: slice) -> Chains:
            return integrate(self.links, frames[rows], xy[rows], self.landmarks)

        return frames, Chains.joined(spread(carry, len(xy), len(xy), THREAD_BYTES)), field

    def _cues(self, chains: Chains, frames: np.ndarray) -> tuple[Path, np.ndarray]:
        """Paths of chains alone, and the cues to judge them by."""
        path = settle(chains, frames, self.camera, None)
        alike = similarity(self.frames, path.at(np.arange(self.num_frames)), frames)
        return path, cues(chains, frames, min(self.size), alike)

    def _settled(self, frames: np.ndarray, chains: Chains, field: Witness) -> np.ndarray:
        """Positions `(N, T, 2)` that chains and field are settled to."""
        return settle(chains, frames, self.camera, field).at(np.arange(self.num_frames))

    def _hear(
        self, frames: np.ndarray, chains: Chains, field: Witness, path: np.ndarray, rows: slice
    ) -> Iterator[tuple[Witnesses, torch.Tensor]]:
        """Witnesses and features of some of the points, part by part."""
        frames, chains, path = frames[rows], chains.of(rows), path[rows]
        field = Witness(field.xy[rows], field.visibility[rows])
        said = call(self._store, self.camera, self.landmarks, chains, path, field, frames)
        for some in _parts(len(frames), self._at_once(WEIGHED)):
            part, seen = said.of(some), field.visibility[some]
            yield part, features(part, seen, self.links, self.frames, frames[some], self.device)

    def _at_once(self, positions: int) -> int:
        """Points whose witnesses name as many positions."""
        return positions // (WITNESSES * self.num_frames)

    @property
    def _scale(self) -> float:
        """The short side in units at which lengths of features are counted."""
        return min(self.size) / REFERENCE_SIDE

    def _answer(self, points: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, Judgement]:
        """Positions and judgement of a chunk of queries at real times, processing pixels."""
        path, judged = self._settle(points)
        # Smoothing moves the query a little; it is given, so the curve is moved back to it.
        nearness = np.clip(1 - np.abs(times - points[:, :1]), 0, 1)[..., None]
        moved = self._given(points) - path.each_at(points[:, 0])
        positions = path.at(times) + moved[:, None] * nearness
        before = np.clip(np.floor(times).astype(int), 0, self.num_frames - 2)
        share = np.clip(times - before, 0, 1)

        def blend(values: np.ndarray) -> np.ndarray:
            return (1 - share) * values[:, before] + share * values[:, before + 1]

        inbounds = inside(positions, self.size)
        asked = nearness[..., 0] > 0.999
        sigma = np.where(asked, QUERY_SIGMA, blend(judged.sigma))
        visibility = np.where(asked, 1, blend(judged.visibility)) * inbounds
        visible = (asked | (blend(judged.visible.astype(np.float32)) > 0.5)) & inbounds
        return positions, Judgement(visibility, sigma, visible)

    def _given(self, points: np.ndarray) -> np.ndarray:
        """Query positions `(N, 2)` in processing pixels."""
        return rescale(points[:, :0:-1], self.video_size, self.size).astype(np.float32)

    @torch.no_grad()
    def render(self, time: float, short_side: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Colour `(h', w', 3)` in [0, 1] and depth `(h', w')` of the field at one time in frames.

        `short_side` bounds the picture's size; 0 renders at the processing resolution.
        """
        height, width = processing_size(self.size, short_side)
        xy = normalize(torch.from_numpy(pixel_centers((height, width))), (height, width))
        xy = xy.reshape(-1, 2).to(self.device)
        moment = torch.tensor([float(time)], device=self.device)
        color, depth = [], []

        def shoot(rows: slice) -> None:
            rays = self.field.cast(moment, xy[None, rows])
            part = rays.composite_color()[0].cpu(), rays.composite_depth()[0].cpu()
            color.append(part[0])
            depth.append(part[1])

        self._in_chunks(len(xy), shoot)
        color = torch.cat(color).view(height, width, 3).numpy()
        return color, torch.cat(depth).view(height, width).numpy()

    @torch.no_grad()
    def _follow(self, points: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions `(n, T, 2)` in processing pixels and visibility `(n, T)`; one query time."""
        xy = rescale(points[:, :0:-1], self.video_size, self.size)
        xy = normalize(torch.from_numpy(np.ascontiguousarray(xy)), self.size).to(self.device)
        rays = self.field.cast(torch.tensor([float(points[0, 0])], device=self.device), xy[None])
        moments = torch.as_tensor(times, dtype=torch.float32, device=self.device)
        positions, visibility = [], []
        for part in moments.split(max(1, self.chunk // len(xy))):
            count = len(part)
            shared = type(rays)(
                *(v.expand(count, *v.shape[1:]) for v in (rays.canonical, rays.depth)),
                *(v.expand(count, *v.shape[1:]) for v in (rays.weight, rays.color)),
                rays.step,
            )
            reached, _ = self.field.follow(shared, part)
            seen = self.field.seen_depth(part, reached[..., :2])
            margin = self.field.render.occlusion_margin
            chance = torch.sigmoid((seen + margin - reached[..., 2]) * (4 / margin))
            pixels = denormalize(reached[..., :2], self.size)
            chance = chance * inside(pixels, self.size)
            positions.append(pixels.transpose(0, 1).cpu().numpy())
            visibility.append(chance.T.cpu().numpy())
        return np.concatenate(positions, axis=1), np.concatenate(visibility, axis=1)

    def _checked(self, query_points: np.ndarray) -> np.ndarray:
        points = np.asarray(query_points, dtype=np.float32)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            raise OmniError(f"queries must be finite numbers (N, 3) t y x, got {points.shape}")
        late = (points[:, 0] < 0) | (points[:, 0] > self.num_frames - 1)
        outside = ~inside(points[:, :0:-1], self.video_size)
        for wrong, what in ((late, "time"), (outside, "frame")):
            if wrong.any():
                which = int(np.flatnonzero(wrong)[0])
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


def _same_time(times: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Indices of queries that share a time, at most `limit` at once."""
    for time in np.unique(times):
        index = np.flatnonzero(times == time)
        for start in range(0, len(index), limit):
            yield index[start : start + limit]
