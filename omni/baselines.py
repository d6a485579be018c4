"""Trajectories from pairwise flow alone: what a user would get without the field.

All three methods offer candidates for a point's position in a frame, each one link (one flow)
after a position that is already known, and keep the best candidate. They differ in the links:

- `chain`: the flow from the adjacent frame;
- `direct`: the flow from the query frame;
- `mft`: flows over the gaps 1, 2, 4, ... 32 and from the query frame; the best sigma wins among
  the candidates that are not occluded (MFT, Neoral et al., WACV 2024, with the forward-backward
  error in place of its learned uncertainty and occlusion).

Letters: N points, T frames. Raster pixels of the processing resolution inside, of the original
video at the border.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from omni.coords import inside, rescale
from omni.errors import OmniError
from omni.links import Links
from omni.store import Store
from omni.tracks import Tracks

__all__ = ["DirectFlow", "Method", "baseline", "trace"]

Method = Literal["direct", "chain", "mft"]

DirectFlow = Callable[[int, int], np.ndarray]
"""`(i, j) -> (h, w, 2)` float32 flow in processing pixels of a pair that the store lacks. Asked for
both directions of a pair, at most twice each."""

_GAPS = (32, 16, 8, 4, 2, 1)

_SIGMA = (0.25, 0.6)
"""Standard deviation of a link: floor in pixels, and slope in its forward-backward error."""


def baseline(
    store: Store,
    query_points: np.ndarray,
    method: Method,
    direct_flow: DirectFlow | None = None,
    threshold: float = 1.5,
) -> Tracks:
    """Track queries forward and backward in time through the stored flows.

    A link whose forward-backward error, taken at the point itself, exceeds `threshold`, or which
    leaves the frame, makes its candidate hidden; so does a hidden start. Where every candidate is
    hidden the one of least sigma carries on. No link crosses a cut: beyond it points are hidden.

    Args:
        store: with finished flows.
        query_points: (N, 3) t, y, x; raster pixels of the original video, t rounded to a frame.
        method: see the module.
        direct_flow: computes flows from the query frame that are not stored. Without it `direct`
            composes the fewest stored flows, and `mft` uses the direct flows that are stored.
        threshold: forward-backward error, processing pixels.

    Returns:
        Tracks in the original video's pixels, in the order of `query_points`. `visibility` is 0
        or 1; `sigma` grows along the links, to the frame's longer side where nothing is known.

    Raises:
        OmniError: unknown method, queries of another shape or outside the video.
    """
    if method not in get_args(Method):
        raise OmniError(f"baseline {method!r} is unknown: use one of {', '.join(get_args(Method))}")
    query_points = np.asarray(query_points, np.float32)
    _check(store, query_points)
    frames = np.rint(query_points[:, 0]).astype(int)
    xy = rescale(query_points[:, :0:-1], store.video_size, store.size)
    found = trace(store, frames, xy, method, direct_flow, threshold)
    return _tracks(store, *found, frames, query_points)


def trace(
    store: Store,
    frames: np.ndarray,
    xy: np.ndarray,
    method: Method,
    direct_flow: DirectFlow | None = None,
    threshold: float = 1.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `baseline`, in processing pixels: points `xy` (N, 2) of `frames` (N,).

    Returns:
        positions (N, T, 2), standard deviations (N, T), inf where nothing is known, and whether
        visible (N, T).
    """
    order = np.argsort(frames, kind="stable")
    state = _State.start(store.num_frames, frames[order], xy[order])
    links = _Links(store, direct_flow)
    for step in (1, -1):
        _sweep(state, links, method, step, threshold)
    back = np.argsort(order)
    return state.xy.transpose(1, 0, 2)[back], state.sigma.T[back], state.visible.T[back]


@dataclass
class _State:
    """Best position known of each point in each frame; points sorted by query frame.

    frames: (N,) query frames. xy: (T, N, 2). sigma: (T, N), inf where nothing is known yet.
    visible: (T, N) bool.
    """

    frames: np.ndarray
    xy: np.ndarray
    sigma: np.ndarray
    visible: np.ndarray

    @classmethod
    def start(cls, num_frames: int, frames: np.ndarray, xy: np.ndarray) -> "_State":
        count = len(frames)
        state = cls(
            frames,
            np.broadcast_to(xy, (num_frames, count, 2)).astype(np.float32),
            np.full((num_frames, count), np.inf, np.float32),
            np.zeros((num_frames, count), bool),
        )
        state.sigma[frames, np.arange(count)] = 0
        state.visible[frames, np.arange(count)] = True
        return state

    def reached(self, frame: int, step: int) -> slice:
        """Slice of the points whose query frame is `frame` or, along `step`, before it."""
        if step > 0:
            return slice(0, np.searchsorted(self.frames, frame, "right"))
        return slice(np.searchsorted(self.frames, frame, "left"), len(self.frames))

    def queried(self, frame: int) -> slice:
        """Slice of the points whose query frame is `frame`."""
        return slice(*np.searchsorted(self.frames, [frame, frame + 1]))

    def offer(self, target: int, rows: slice, xy, sigma, visible) -> None:
        """Adopt candidates that are visible instead of hidden or, being equal, more certain."""
        now_sigma, now_visible = self.sigma[target, rows], self.visible[target, rows]
        better = (visible > now_visible) | ((visible == now_visible) & (sigma < now_sigma))
        self.xy[target, rows][better] = xy[better]
        now_sigma[better] = sigma[better]
        now_visible[better] = visible[better]


class _Links(Links):
    """Stored links, plus direct flows computed on demand."""

    def __init__(self, store: Store, direct_flow: DirectFlow | None):
        super().__init__(store)
        self._direct_flow = direct_flow
        joined = [self.stored(t, t + 1) for t in range(self.num_frames - 1)]
        self._shot = np.cumsum([0, *(not value for value in joined)])

    def direct(self, source: int, target: int) -> bool:
        """Whether the direct flow can be had; never across a cut."""
        computable = self._direct_flow and self._shot[source] == self._shot[target]
        return bool(computable) or self.stored(source, target)

    def fields(self, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Flow fields of both directions, stored or computed."""
        if self.stored(source, target):
            return super().fields(source, target)
        pairs = ((source, target), (target, source))
        return tuple(np.asarray(self._direct_flow(*pair), np.float32) for pair in pairs)

    def paths(self, source: int, step: int) -> dict[int, int]:
        """Predecessor of each frame on its path of fewest stored flows from `source` on."""
        before, queue = {source: source}, deque([source])
        while queue:
            frame = queue.popleft()
            for target in range(frame + step, self.num_frames if step > 0 else -1, step):
                if target not in before and self.stored(frame, target):
                    before[target] = frame
                    queue.append(target)
        return before


def _sweep(state: _State, links: _Links, method: Method, step: int, threshold: float) -> None:
    """Fill every frame after (`step` 1) or before (-1) each query, nearest first."""
    paths = {}
    if method == "direct":
        paths = {int(frame): links.paths(int(frame), step) for frame in np.unique(state.frames)}
    for target in range(links.num_frames)[::step]:
        for source, rows in _candidates(state, links, method, paths, target, step):
            xy, error = links.follow(source, target, state.xy[source, rows])
            link = _SIGMA[0] + _SIGMA[1] * error
            sigma = np.hypot(state.sigma[source, rows], link)
            visible = state.visible[source, rows] & (error < threshold) & inside(xy, links.size)
            state.offer(target, rows, xy, sigma, visible)
        if 0 <= target - step < links.num_frames:
            _carry(state, target, step)
        links.release()


def _candidates(
    state: _State, links: _Links, method: Method, paths: dict, target: int, step: int
) -> Iterator[tuple[int, slice]]:
    """Source frames of the links into `target`, and the points that each applies to."""
    if method != "direct":
        for gap in _GAPS if method == "mft" else (1,):
            source = target - step * gap
            if 0 <= source < links.num_frames and links.stored(source, target):
                yield source, state.reached(source, step)
    if method != "chain":
        earlier = state.frames[state.reached(target - step, step)]
        for frame in np.unique(earlier).tolist():
            linked = method == "mft" and abs(target - frame) in _GAPS
            if links.direct(frame, target) and not (linked and links.stored(frame, target)):
                yield frame, state.queried(frame)
            elif method == "direct" and target in paths[frame]:
                yield paths[frame][target], state.queried(frame)


def _carry(state: _State, target: int, step: int) -> None:
    """Leave points that no link reaches (beyond a cut) where they were last, hidden."""
    rows = state.reached(target - step, step)
    lost = np.isinf(state.sigma[target, rows])
    state.xy[target, rows][lost] = state.xy[target - step, rows][lost]


def _tracks(store: Store, xy, sigma, visible, frames, query_points: np.ndarray) -> Tracks:
    """What `trace` found, in the original video's pixels."""
    source, target = store.size, store.video_size
    xy = rescale(xy, source, target)
    xy[np.arange(len(xy)), frames] = query_points[:, :0:-1]
    scale = np.float32(np.sqrt(target[0] * target[1] / (source[0] * source[1])))
    return Tracks(
        tracks=xy,
        visible=visible,
        visibility=visible.astype(np.float32),
        sigma=np.minimum(sigma * scale, np.float32(max(target))),
        query_points=query_points,
        size=target,
        fps=store.fps,
    )


def _check(store: Store, query_points: np.ndarray) -> None:
    if query_points.ndim != 2 or query_points.shape[1] != 3:
        raise OmniError(f"query_points must be (N, 3), t y x, not {query_points.shape}")
    frames, size = np.rint(query_points[:, 0]), store.video_size
    valid = (frames >= 0) & (frames < store.num_frames) & inside(query_points[:, :0:-1], size)
    if not valid.all():
        bad = int(np.argmin(valid))
        raise OmniError(
            f"query {bad} (t, y, x) = {query_points[bad].tolist()} lies outside the video of "
            f"{store.num_frames} frames of {size[1]}x{size[0]} pixels: leave it out"
        )
