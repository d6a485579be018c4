"""Trajectories before any learning: Gaussian integration of flows along chains.

A point's state in a frame is a Gaussian: mean position, one standard deviation, and a level of
trust. Every stored flow that reaches a frame offers a candidate, one link after a state already
known; the candidates that agree are fused with the exact weights for correlated estimates. A sweep
forward and one backward in time start at the query; a recovery sweep from each end of the video
then finds points again that came back from behind an occluder.

Letters: G gaps, N points, T frames. Raster pixels of the processing resolution.

Source: "Probabilistic Integration for Robust and Accurate Point Tracking" (ProTracker), with the
published correlation rule, which can be worse than its best source, replaced by the exact one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from omni.coords import inside
from omni.landmarks import Landmarks
from omni.links import Links
from omni.store import UNKNOWN

__all__ = ["Chains", "States", "fuse", "integrate"]

LOST, GUESSED, LOOSE, STRICT = 0, 1, 2, 3
"""Levels of trust: no chain; some adjacent link does not close, so that a point may have gone over
to another surface; every link closes loosely; every link closes within STRICT_ERROR."""

STRICT_ERROR = 0.4
LOOSE_ERROR, LOOSE_SHARE = 3.0, 0.03
"""Forward-backward errors in pixels up to which a link keeps a level; the loose one may grow with
the length of the flow. A strict bound must not: it is at motion borders that points slide over."""

CORRELATION = 0.75
"""Correlation of candidates: they share frames, texture and the same smoothness prior."""

DRIFT = 0.5
"""Correlation of a link's error with the chain's so far: drift has a direction, so that many short
links are worse than their variances added up say."""

LARGEST_STRETCH = 1.5
"""Most by which a link's Jacobian spreads the error so far: beyond, it crosses a motion border."""

FARTHEST = 0.5
"""Short sides of the frame within which feature matches may find a point again, from where it was
seen nearest in time: what lies further off is a repetition of it, and itself out of the frame."""

GATE = 2.5
"""Candidates further from the best than this many joint standard deviations are not fused."""


@dataclass
class States:
    """Gaussian states of points and how they came about; the points are the second axis.

    xy: mean. sigma: pixels, inf where lost. level: uint8 trust. error: forward-backward error of
    the best link. agree: uint8 fused candidates. covered: share of the links from strict states
    whose double cycle says hidden. stretch: largest stretch of the best link along the chain; high
    at motion borders.
    """

    xy: np.ndarray
    sigma: np.ndarray
    level: np.ndarray
    error: np.ndarray
    agree: np.ndarray
    covered: np.ndarray
    stretch: np.ndarray

    def of(self, rows: slice) -> Self:
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
        """Everything lost but the queries: `frames` (N,) and positions `xy` (N, 2)."""
        shape = (num_frames, len(xy))
        chains = cls(
            xy=np.broadcast_to(xy, (*shape, 2)).astype(np.float32),
            sigma=np.full(shape, np.inf, np.float32),
            level=np.zeros(shape, np.uint8),
            error=np.full(shape, np.inf, np.float32),
            agree=np.zeros(shape, np.uint8),
            covered=np.zeros(shape, np.float32),
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
    """Carry points through the whole video.

    Args:
        links: the stored flows.
        frames: (N,) query frame of each point.
        xy: (N, 2) positions there.
        landmarks: feature matches between distant frames and imported tracks, if any.

    Memory is the result's plus a few arrays of N points per gap.
    """
    chains = Chains.start(links.num_frames, frames, xy)
    job = _Job(chains, links, landmarks, frames, _labels(links, frames, xy))
    times = range(links.num_frames)
    for step in (1, -1):
        for target in times[::step]:
            job.offer(target, step, np.flatnonzero((target - frames) * step > 0))
            links.release()
    for step in (1, -1):
        for target in times[::-step]:
            later = np.flatnonzero((target - frames) * step > 0)
            job.offer(target, -step, later[chains.level[target, later] < STRICT])
            links.release()
    return chains


def _labels(links: Links, frames: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Mask labels (N,) of the queries, UNKNOWN where the user gave none."""
    labels = np.full(len(frames), UNKNOWN, np.uint8)
    for frame in np.unique(frames):
        rows = np.flatnonzero(frames == frame)
        labels[rows] = links.labels(int(frame), xy[rows])
    return labels


@dataclass
class _Job:
    """One integration: its states and where their evidence comes from.

    frames: (N,) query frames.
    labels: (N,) mask label that a point keeps for good.
    """

    chains: Chains
    links: Links
    landmarks: Landmarks | None
    frames: np.ndarray
    labels: np.ndarray

    def offer(self, target: int, step: int, rows: np.ndarray) -> None:
        """Fuse all candidates for `rows` in frame `target`; adopt where the level rises."""
        offers = list(self._candidates(target, step, rows))
        if not offers or len(rows) == 0:
            return
        xy, sigma, level, error, stretch = (np.stack(v) for v in zip(*offers, strict=True))
        best_level = level.max(0)
        # Never across levels: a loose estimate may already sit on the occluder.
        usable = (level == best_level) & (best_level > LOST)
        mean, deviation, agree, best = fuse(xy, np.where(usable, sigma, np.inf))
        chains = self.chains
        rise = best_level > chains.level[target, rows]
        chosen, picked = rows[rise], (best[rise], np.flatnonzero(rise))
        chains.xy[target, chosen] = mean[rise]
        chains.sigma[target, chosen] = deviation[rise]
        chains.level[target, chosen] = best_level[rise]
        chains.error[target, chosen] = error[picked]
        chains.agree[target, chosen] = agree[rise]
        chains.stretch[target, chosen] = stretch[picked]

    def _candidates(self, target: int, step: int, rows: np.ndarray) -> Iterator[tuple]:
        """Position, sigma, level, cycle error and stretch of one more link, for every source."""
        chains, links = self.chains, self.links
        votes, told = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
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
                    # A longer leap that does not close may land anywhere, as for a point that
                    # has left the frame.
                    GUESSED if gap == 1 else LOST,
                ),
            )
            before, link = chains.sigma[source, rows], links.sigma(gap, error)
            before = before * np.clip(stretch, 1, LARGEST_STRETCH)
            # A lost source has infinite sigma; its product with a finite one stays infinite.
            sigma = np.sqrt(before**2 + link**2 + 2 * DRIFT * before * link)
            strict = chains.level[source, rows] == STRICT
            votes += links.covered(source, target, start) & strict
            told += strict
            stretch = np.maximum(stretch, chains.stretch[source, rows])
            yield arrived, sigma, self._level(level, source, target, rows, arrived), error, stretch
        chains.covered[target, rows] = votes / np.maximum(told, 1)
        yield from self._recognised(target, step, rows)

    def _recognised(self, target: int, step: int, rows: np.ndarray) -> Iterator[tuple]:
        """Candidates from landmarks: one per key frame that leads to `target`, one from tracks.

        Feature matches speak only where no flow does: over more frames than the longest one.
        """
        chains, landmarks = self.chains, self.landmarks
        if landmarks is None:
            return
        away = {s: (target - s) * step for s in landmarks.sources(target)}
        sources = [source for source, gap in away.items() if gap > self.links.gaps[-1]]
        seen = self._last_seen(target, rows) if sources else None
        for source in sources:
            start = chains.xy[source, rows]
            strict = chains.level[source, rows] == STRICT
            arrived, spread = start.copy(), np.full(len(rows), np.inf, np.float32)
            arrived[strict], spread[strict] = landmarks.follow(source, target, start[strict])
            leap = np.linalg.norm(arrived - seen, axis=-1)
            spread[leap > FARTHEST * min(self.links.size)] = np.inf
            yield self._landed(np.full(len(rows), source), target, rows, arrived, spread)
        if landmarks.imported:
            frames = self.frames[rows]
            arrived, spread = landmarks.observe(frames, chains.xy[frames, rows], target)
            yield self._landed(frames, target, rows, arrived, spread)

    def _last_seen(self, target: int, rows: np.ndarray) -> np.ndarray:
        """Positions `(n, 2)` in the strict frame of each point that is nearest to `target`."""
        strict = self.chains.level[:, rows] == STRICT
        away = np.abs(np.arange(len(strict)) - target)[:, None]
        nearest = np.where(strict, away, len(strict)).argmin(0)
        return self.chains.xy[nearest, rows]

    def _landed(self, sources, target, rows, arrived, spread) -> tuple:
        """A landmark's candidate: as good as strict; its sigma starts from the source's."""
        known = np.isfinite(spread)
        before = self.chains.sigma[sources, rows]
        sigma = np.hypot(np.where(known, before, 0), spread)
        level = self._level(np.where(known, STRICT, LOST), sources, target, rows, arrived)
        return arrived, sigma, level, spread, self.chains.stretch[sources, rows]

    def _level(self, level, source, target, rows, arrived):
        """Trust in a link: no more than in its source, none off the frame or on another object."""
        here, own = self.links.labels(target, arrived), self.labels[rows]
        possible = (here == own) | (here == UNKNOWN) | (own == UNKNOWN)
        possible &= inside(arrived, self.links.size)
        return (np.minimum(level, self.chains.level[source, rows]) * possible).astype(np.uint8)


def fuse(
    xy: np.ndarray, sigma: np.ndarray, correlation: float = CORRELATION
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Best linear unbiased fusion of equally correlated estimates that agree with the best one.

    With `C = D[(1-p) I + p 11^T] D`, `a = 1/s`, `S1 = sum a`, `S2 = sum a^2`,
    `b = p / (1 + (K-1) p)`: weights `a_k (a_k - b S1)`, variance `(1-p) / (S2 - b S1^2)`.
    Sources whose exact weight would be negative are left out, which is what keeps the result at
    least as good as the best source.

    Args:
        xy: (G, N, 2) candidates.
        sigma: (G, N) standard deviations; inf for candidates that do not exist.
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
