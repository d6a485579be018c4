"""Tracks from pairwise flow alone, by three simple ways of chaining links.

Each position is one link (one flow) after a known one; the methods differ in the links that they
use (see `trace`). The tracks are candidates for selection, and the baselines of an evaluation.

Letters: N points, T frames. Raster pixels of the processing resolution.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from omni.maths import inside
from omni.store import Store
from omni.tracking.links import Links

__all__ = ["DirectFlow", "Method", "trace"]

Method = Literal["direct", "chain", "mft"]

DirectFlow = Callable[[int, int], np.ndarray]
"""`(i, j) -> (h, w, 2)` float32 flow in processing pixels of a pair that the store lacks. Called
for both directions of a pair, at most twice each."""

_GAPS = (32, 16, 8, 4, 2, 1)

_SIGMA = (0.25, 0.6)
"""Standard deviation of a link: floor in pixels, and slope in its forward-backward error."""


def trace(
    store: Store,
    frames: np.ndarray,
    xy: np.ndarray,
    method: Method,
    direct_flow: DirectFlow | None = None,
    threshold: float = 1.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Track points forward and backward in time through the stored flows.

    A link whose forward-backward error exceeds `threshold`, or which leaves the frame, makes its
    candidate occluded; so does an occluded start. The visible candidate of least sigma is kept,
    the occluded one of least sigma where none is visible. No link crosses a cut.

    Args:
        store: with finished flows.
        frames: (N,) query frames.
        xy: (N, 2) query positions, processing pixels.
        method: links used: `chain`, from the adjacent frame; `direct`, from the query frame;
            `mft`, over the gaps 1, 2, 4, ... 32 and from the query frame.
        direct_flow: computes flows from the query frame that are not stored, None without.
        threshold: forward-backward error, processing pixels.

    Returns:
        positions (N, T, 2), standard deviations (N, T), inf where there is no estimate, and
        visibility (N, T) bool.

    Source: `mft` after Neoral et al., "MFT: Long-Term Tracking of Every Pixel", WACV 2024.
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
    """Best estimate so far of each point in each frame; points sorted by query frame.

    Attributes:
        frames: (N,) query frames.
        xy: (T, N, 2) positions.
        sigma: (T, N) standard deviations, inf where there is no estimate yet.
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

    def started(self, frame: int, step: int) -> slice:
        """Slice of the points whose query frame is `frame` or, along `step`, before it."""
        if step > 0:
            return slice(0, np.searchsorted(self.frames, frame, "right"))
        return slice(np.searchsorted(self.frames, frame, "left"), len(self.frames))

    def queried(self, frame: int) -> slice:
        """Slice of the points whose query frame is `frame`."""
        return slice(*np.searchsorted(self.frames, [frame, frame + 1]))

    def update(
        self, target: int, rows: slice, xy: np.ndarray, sigma: np.ndarray, visible: np.ndarray
    ) -> None:
        """Adopt candidates that are visible instead of occluded or, if equal, of smaller sigma."""
        old_sigma, old_visible = self.sigma[target, rows], self.visible[target, rows]
        better = (visible > old_visible) | ((visible == old_visible) & (sigma < old_sigma))
        self.xy[target, rows][better] = xy[better]
        old_sigma[better] = sigma[better]
        old_visible[better] = visible[better]


class _Links(Links):
    """Stored links, plus direct flows computed on demand."""

    def __init__(self, store: Store, direct_flow: DirectFlow | None):
        super().__init__(store)
        self._direct_flow = direct_flow
        connected = [self.stored(t, t + 1) for t in range(self.num_frames - 1)]
        self._shot = np.cumsum([0, *(not value for value in connected)])

    def direct(self, source: int, target: int) -> bool:
        """Whether the direct flow is stored or can be computed; never across a cut."""
        computable = self._direct_flow and self._shot[source] == self._shot[target]
        return bool(computable) or self.stored(source, target)

    def fields(self, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Forward and backward flow of a pair, stored or computed."""
        if self.stored(source, target):
            return super().fields(source, target)
        assert self._direct_flow is not None
        forward = np.asarray(self._direct_flow(source, target), np.float32)
        return forward, np.asarray(self._direct_flow(target, source), np.float32)

    def paths(self, source: int, step: int) -> dict[int, int]:
        """Predecessor of each frame on its path of fewest stored flows from `source`."""
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
    paths: dict[int, dict[int, int]] = {}
    if method == "direct":
        paths = {int(frame): links.paths(int(frame), step) for frame in np.unique(state.frames)}
    for target in range(links.num_frames)[::step]:
        for source, rows in _sources(state, links, method, paths, target, step):
            xy, error = links.follow(source, target, state.xy[source, rows])
            link = _SIGMA[0] + _SIGMA[1] * error
            sigma = np.hypot(state.sigma[source, rows], link)
            visible = state.visible[source, rows] & (error < threshold) & inside(xy, links.size)
            state.update(target, rows, xy, sigma, visible)
        if 0 <= target - step < links.num_frames:
            _hold(state, target, step)
        links.release()


def _sources(
    state: _State,
    links: _Links,
    method: Method,
    paths: dict[int, dict[int, int]],
    target: int,
    step: int,
) -> Iterator[tuple[int, slice]]:
    """Source frames of the links into `target`, and the points that each applies to."""
    if method != "direct":
        for gap in _GAPS if method == "mft" else (1,):
            source = target - step * gap
            if 0 <= source < links.num_frames and links.stored(source, target):
                yield source, state.started(source, step)
    if method != "chain":
        earlier = state.frames[state.started(target - step, step)]
        for frame in np.unique(earlier).tolist():
            linked = method == "mft" and abs(target - frame) in _GAPS
            if links.direct(frame, target) and not (linked and links.stored(frame, target)):
                yield frame, state.queried(frame)
            elif method == "direct" and target in paths[frame]:
                yield paths[frame][target], state.queried(frame)


def _hold(state: _State, target: int, step: int) -> None:
    """Hold points that no link reaches (beyond a cut) at their last position, as occluded."""
    rows = state.started(target - step, step)
    lost = np.isinf(state.sigma[target, rows])
    state.xy[target, rows][lost] = state.xy[target - step, rows][lost]
