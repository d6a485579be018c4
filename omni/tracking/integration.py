"""Trajectories before any learning: Gaussian integration of flows along chains.

A point's state in a frame is a Gaussian: mean position, one standard deviation, and a level of
cycle consistency. Every stored flow into a frame gives a candidate, one link after a known state;
candidates that agree are fused with the exact weights for correlated estimates. A sweep forward
and one backward in time start at the query; a recovery sweep from each end of the video then finds
points again that reappear from behind an occluder.

Letters: K candidates, N points, T frames. Raster pixels of the processing resolution.

Source: "Probabilistic Integration for Robust and Accurate Point Tracking" (ProTracker), with the
published correlation rule, which can be worse than its best source, replaced by the exact one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from omni.maths import inside
from omni.store import UNKNOWN
from omni.tracking.landmarks import Landmarks
from omni.tracking.links import Links

__all__ = ["Chains", "States", "fuse", "integrate"]

LOST, UNVERIFIED, LOOSE, STRICT = 0, 1, 2, 3
"""Levels of cycle consistency of a chain. LOST: there is no chain. UNVERIFIED: an adjacent link is
not cycle consistent, so that the point may have moved to another surface. LOOSE and STRICT: the
forward-backward error of every link lies within the loose and within the strict tolerance."""

STRICT_ERROR = 0.4
LOOSE_ERROR, LOOSE_SHARE = 3.0, 0.03
"""Tolerances of cycle consistency: largest forward-backward error of a link in pixels. The loose
one also grows with the length of the flow, by LOOSE_SHARE. The strict one must not: it is what
detects points that slide onto the other surface at a motion border."""

CORRELATION = 0.75
"""Correlation of candidates' errors: they share frames, texture and the same smoothness prior."""

DRIFT = 0.5
"""Correlation of a link's error with the chain's so far: drift has a direction, so that the error
of many short links exceeds the sum of their variances."""

LARGEST_STRETCH = 1.5
"""Largest factor by which a link's Jacobian scales the error so far; a larger one means that the
stencil crosses a motion border."""

FARTHEST = 0.5
"""Farthest that feature matches may place a point from its nearest strict state in time, in short
sides of the frame: beyond, the match is a repetition of the texture."""

GATE = 2.5
"""Candidates further from the best than this many joint standard deviations are not fused."""


@dataclass
class States:
    """Gaussian states of points and the evidence behind them; the points are the second axis.

    Attributes:
        xy: mean, pixels.
        sigma: standard deviation, pixels; inf where lost.
        level: uint8 level of cycle consistency.
        error: forward-backward error of the best link, pixels.
        num_fused: uint8 number of candidates fused.
        occluded: share of the links from strict states whose double cycle detects an occlusion.
        stretch: largest stretch of the best links along the chain; high at motion borders.
    """

    xy: np.ndarray
    sigma: np.ndarray
    level: np.ndarray
    error: np.ndarray
    num_fused: np.ndarray
    occluded: np.ndarray
    stretch: np.ndarray

    def subset(self, rows: slice) -> Self:
        """The states of some of the points."""
        return type(self)(**{name: value[:, rows] for name, value in vars(self).items()})

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """The states of the points of all parts."""
        names = vars(parts[0])
        return cls(**{name: np.concatenate([vars(p)[name] for p in parts], 1) for name in names})


@dataclass
class Chains(States):
    """Integrated states of N points in T frames: xy (T, N, 2), all others (T, N)."""

    @classmethod
    def start(cls, num_frames: int, frames: np.ndarray, xy: np.ndarray) -> "Chains":
        """All states lost except those of the queries: `frames` (N,), positions `xy` (N, 2)."""
        shape = (num_frames, len(xy))
        chains = cls(
            xy=np.broadcast_to(xy, (*shape, 2)).astype(np.float32),
            sigma=np.full(shape, np.inf, np.float32),
            level=np.zeros(shape, np.uint8),
            error=np.full(shape, np.inf, np.float32),
            num_fused=np.zeros(shape, np.uint8),
            occluded=np.zeros(shape, np.float32),
            stretch=np.ones(shape, np.float32),
        )
        query = frames, np.arange(len(xy))
        chains.sigma[query], chains.level[query], chains.error[query] = 0, STRICT, 0
        return chains

    def queries(self, frames: np.ndarray) -> np.ndarray:
        """Positions (N, 2) in the query frames (N,)."""
        return self.xy[frames, np.arange(len(frames))]


def integrate(
    links: Links, frames: np.ndarray, xy: np.ndarray, landmarks: Landmarks | None = None
) -> Chains:
    """Chain flows from the queries through the whole video.

    Memory is the result's plus a few arrays of N points per gap.

    Args:
        links: the stored flows.
        frames: (N,) query frame of each point.
        xy: (N, 2) query positions, pixels of the processing resolution.
        landmarks: feature matches between distant frames and imported tracks, if any.

    Returns:
        States of the N points in all T frames.
    """
    chains = Chains.start(links.num_frames, frames, xy)
    sweep = _Integration(chains, links, landmarks, frames, _labels(links, frames, xy))
    times = range(links.num_frames)
    for step in (1, -1):
        for target in times[::step]:
            sweep.advance(target, step, np.flatnonzero((target - frames) * step > 0))
            links.release()
    for step in (1, -1):
        for target in times[::-step]:
            later = np.flatnonzero((target - frames) * step > 0)
            sweep.advance(target, -step, later[chains.level[target, later] < STRICT])
            links.release()
    return chains


def _labels(links: Links, frames: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Mask labels (N,) of the queries, UNKNOWN where the user gave none."""
    labels = np.full(len(frames), UNKNOWN, np.uint8)
    for frame in np.unique(frames):
        rows = np.flatnonzero(frames == frame)
        labels[rows] = links.labels(int(frame), xy[rows])
    return labels


_Candidate = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Position (n, 2), sigma, level, forward-backward error and stretch (n,) after one more link."""


@dataclass
class _Integration:
    """The states under way and the sources of candidates.

    Attributes:
        chains: states, updated in place.
        links: the stored flows.
        landmarks: sparse matches and imported tracks, None without.
        frames: (N,) query frames.
        labels: (N,) mask label of each query, which its track must keep.
    """

    chains: Chains
    links: Links
    landmarks: Landmarks | None
    frames: np.ndarray
    labels: np.ndarray

    def advance(self, target: int, step: int, rows: np.ndarray) -> None:
        """Fuse all candidates for points `rows` in frame `target`; adopt where the level rises."""
        candidates = [
            *self._flow_candidates(target, step, rows),
            *self._landmark_candidates(target, step, rows),
        ]
        if not candidates or len(rows) == 0:
            return
        xy, sigma, level, error, stretch = (np.stack(v) for v in zip(*candidates, strict=True))
        best_level = level.max(0)
        # Never across levels: a loose estimate may already lie on the occluder.
        usable = (level == best_level) & (best_level > LOST)
        mean, deviation, num_fused, best = fuse(xy, np.where(usable, sigma, np.inf))
        chains = self.chains
        better = best_level > chains.level[target, rows]
        updated, best_link = rows[better], (best[better], np.flatnonzero(better))
        chains.xy[target, updated] = mean[better]
        chains.sigma[target, updated] = deviation[better]
        chains.level[target, updated] = best_level[better]
        chains.error[target, updated] = error[best_link]
        chains.num_fused[target, updated] = num_fused[better]
        chains.stretch[target, updated] = stretch[best_link]

    def _flow_candidates(self, target: int, step: int, rows: np.ndarray) -> Iterator[_Candidate]:
        """A candidate from each gap whose flow into `target` is stored; notes occlusions too."""
        chains, links = self.chains, self.links
        occluded, total = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
        for gap in links.gaps:
            source = target - step * gap
            if not links.stored(source, target):
                continue
            start = chains.xy[source, rows]
            arrived, error = links.follow(source, target, start)
            stretch = links.stretch(source, target, start)
            length = np.linalg.norm(arrived - start, axis=-1)
            level = np.where(
                error < STRICT_ERROR,
                STRICT,
                np.where(
                    error < np.maximum(LOOSE_ERROR, LOOSE_SHARE * length),
                    LOOSE,
                    # A longer flow that is not cycle consistent may end anywhere, as for a point
                    # that has left the frame.
                    UNVERIFIED if gap == 1 else LOST,
                ),
            )
            before, link = chains.sigma[source, rows], links.sigma(gap, error)
            before = before * np.clip(stretch, 1, LARGEST_STRETCH)
            # A lost source has infinite sigma; its product with a finite one stays infinite.
            sigma = np.sqrt(before**2 + link**2 + 2 * DRIFT * before * link)
            strict = chains.level[source, rows] == STRICT
            occluded += links.occluded(source, target, start) & strict
            total += strict
            stretch = np.maximum(stretch, chains.stretch[source, rows])
            yield arrived, sigma, self._level(level, source, target, rows, arrived), error, stretch
        chains.occluded[target, rows] = occluded / np.maximum(total, 1)

    def _landmark_candidates(
        self, target: int, step: int, rows: np.ndarray
    ) -> Iterator[_Candidate]:
        """A candidate from some key frames matched with `target`, and one from imported tracks."""
        chains, landmarks = self.chains, self.landmarks
        if landmarks is None:
            return
        sources = self._key_frames(landmarks, target, step)
        if sources:
            nearest = self._nearest_strict(target, rows)
        for source in sources:
            start = chains.xy[source, rows]
            strict = chains.level[source, rows] == STRICT
            arrived, sigma = start.copy(), np.full(len(rows), np.inf, np.float32)
            arrived[strict], sigma[strict] = landmarks.follow(source, target, start[strict])
            distance = np.linalg.norm(arrived - nearest, axis=-1)
            sigma[distance > FARTHEST * min(self.links.size)] = np.inf
            yield self._after_landmark(np.full(len(rows), source), target, rows, arrived, sigma)
        if landmarks.imported:
            frames = self.frames[rows]
            arrived, sigma = landmarks.observe(frames, chains.xy[frames, rows], target)
            yield self._after_landmark(frames, target, rows, arrived, sigma)

    def _key_frames(self, landmarks: Landmarks, target: int, step: int) -> list[int]:
        """Key frames whose feature matches with `target` are used, the nearest first.

        Only over more frames than the longest stored flow, and of those the nearest, the second,
        the fourth, the eighth, ...: all of them would make a frame of a long video cost more.
        """
        away = {(target - source) * step: source for source in landmarks.sources(target)}
        beyond = [away[gap] for gap in sorted(away) if gap > self.links.gaps[-1]]
        return [beyond[2**k - 1] for k in range(len(beyond).bit_length())]

    def _nearest_strict(self, target: int, rows: np.ndarray) -> np.ndarray:
        """Positions `(n, 2)` in the strict frame of each point that is nearest to `target`."""
        strict = self.chains.level[:, rows] == STRICT
        away = np.abs(np.arange(len(strict)) - target)[:, None]
        nearest = np.where(strict, away, len(strict)).argmin(0)
        return self.chains.xy[nearest, rows]

    def _after_landmark(
        self,
        sources: np.ndarray,
        target: int,
        rows: np.ndarray,
        arrived: np.ndarray,
        transfer_sigma: np.ndarray,
    ) -> _Candidate:
        """A landmark's candidate: counts as strict; its sigma adds to that of the source state."""
        known = np.isfinite(transfer_sigma)
        before = self.chains.sigma[sources, rows]
        sigma = np.hypot(np.where(known, before, 0), transfer_sigma)
        level = self._level(np.where(known, STRICT, LOST), sources, target, rows, arrived)
        return arrived, sigma, level, transfer_sigma, self.chains.stretch[sources, rows]

    def _level(
        self,
        level: np.ndarray,
        source: int | np.ndarray,
        target: int,
        rows: np.ndarray,
        arrived: np.ndarray,
    ) -> np.ndarray:
        """Level after a link: at most its source's; LOST off the frame or on another object."""
        label, expected = self.links.labels(target, arrived), self.labels[rows]
        possible = (label == expected) | (label == UNKNOWN) | (expected == UNKNOWN)
        possible &= inside(arrived, self.links.size)
        return (np.minimum(level, self.chains.level[source, rows]) * possible).astype(np.uint8)


def fuse(
    xy: np.ndarray, sigma: np.ndarray, correlation: float = CORRELATION
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Best linear unbiased fusion of equally correlated estimates that agree with the best one.

    With `C = D[(1-p) I + p 11^T] D`, `a = 1/s`, `S1 = sum a`, `S2 = sum a^2`,
    `b = p / (1 + (K-1) p)`: weights `a_k (a_k - b S1)`, variance `(1-p) / (S2 - b S1^2)`.
    Candidates whose exact weight would be negative are left out, which keeps the variance at most
    that of the best candidate.

    Args:
        xy: (K, N, 2) candidates.
        sigma: (K, N) standard deviations; inf for candidates that do not exist.
        correlation: p between any two candidates.

    Returns:
        (N, 2) mean, (N,) sigma, (N,) number of candidates fused, (N,) index of the best; where no
        candidate exists the first one's position with sigma inf.
    """
    points = np.arange(xy.shape[1])
    best = sigma.argmin(0)
    top, top_sigma = xy[best, points], sigma[best, points]
    distance = np.linalg.norm(xy - top, axis=-1)
    finite = np.isfinite(sigma)
    safe = np.where(finite, np.maximum(sigma, 1e-3), 1.0)
    used = finite & (distance <= GATE * np.hypot(safe, np.where(finite, top_sigma, 0)))
    for _ in range(len(xy)):
        a = used / safe
        count = np.maximum(used.sum(0), 1)
        b = correlation / (1 + (count - 1) * correlation)
        weight = a * (a - b * a.sum(0))
        negative = used & (weight < 0)
        if not negative.any():
            break
        used &= ~negative
    total = weight.sum(0)
    variance = (1 - correlation) / np.maximum((a**2).sum(0) - b * a.sum(0) ** 2, 1e-12)
    exists = finite.any(0) & (total > 0)
    mean = (weight[..., None] * xy).sum(0) / np.where(exists, total, 1)[:, None]
    deviation = np.minimum(np.sqrt(variance), top_sigma)
    return (
        np.where(exists[:, None], mean, top).astype(np.float32),
        np.where(exists, deviation, top_sigma).astype(np.float32),
        used.sum(0).astype(np.uint8),
        best,
    )
