"""Two witnesses to one trajectory: the chain of flows and the field.

The chain is exact to a fraction of a pixel while every link closes, and knows when it is lost. The
field always answers, smoothly, from everything it saw. So the chain says where a point is while it
is trusted, and the field bridges the rest, shifted to meet the chain at both ends; beyond the last
trusted frame the chain's guess leads on. What their disagreement means for visibility is judged in
`omni.confidence`.

Letters: N points, T frames. Raster pixels of the processing resolution.
"""

from dataclasses import dataclass

import numpy as np

from omni.camera import Camera
from omni.integration import GUESSED, LOOSE, STRICT, Chains
from omni.smoothing import Curves, fit_curves

__all__ = ["Path", "Witness", "bridge", "curve", "settle"]

FIELD_FLOOR, FIELD_GROWTH = 0.5, 0.2
"""Error of the field that is nothing unusual: pixels, and pixels per root frame from the query."""

BEST_FIELD, APART_SHARE, UNKNOWN_APART = 0.3, 1.5, 2.0
"""Standard deviation of the field for one point, which grows likewise: at best, per pixel by which
it is apart from the point's strict chain at the median, and pixels where there is no such chain."""

SUREST = 0.3
"""Least standard deviation that a position counts with, pixels."""

PINNED = 100.0
"""Weight of the query itself: its position is given, not measured."""


@dataclass(frozen=True)
class Path:
    """Trajectories of N points: curves in the stabilised plane, seen by a moving camera."""

    curves: Curves
    camera: Camera

    def at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, M, 2)` in processing pixels at `(M,)` real times in frames."""
        return self.camera.restore(self.curves.at(times), times)

    def each_at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, 2)`, every point at its own one of `(N,)` times."""
        own = self.curves.each_at(times)
        return self.camera.restore(own[None], times)[0]


@dataclass
class Witness:
    """What the field says: xy (N, T, 2) and visibility (N, T)."""

    xy: np.ndarray
    visibility: np.ndarray


def settle(chains: Chains, frames: np.ndarray, camera: Camera, field: Witness | None) -> Path:
    """One trajectory per point from both witnesses.

    Bridging and smoothing happen in the stabilised plane, where the camera's own shake, which is
    real and fast, has been taken out.

    Args:
        chains: integrated flows of N points.
        frames: (N,) query frames.
        camera: global motion of the frames.
        field: the field's account; None before any fit.
    """
    level, points = chains.level.T, np.arange(len(frames))
    deviation = np.where(np.isfinite(chains.sigma.T), chains.sigma.T, 0)
    measured = camera.stabilize(chains.xy.transpose(1, 0, 2))
    if field is not None:
        field = Witness(camera.stabilize(field.xy), field.visibility)
    dead = _dead_ends(level)
    xy = bridge(measured, (level > GUESSED) | dead, None if field is None else field.xy)
    weight = np.select(
        [level == STRICT, level == LOOSE, dead],
        [1 / (0.09 + deviation**2), 0.3 / (4 + deviation**2), 0.02],
        1e-4 if field is None else 0.05,
    )
    if field is not None:
        xy, weight = _with_field(xy, weight, deviation, level, field, frames)
    xy[points, frames], weight[points, frames] = measured[points, frames], PINNED
    return Path(fit_curves(xy, weight), camera)


def curve(
    xy: np.ndarray, sigma: np.ndarray, frames: np.ndarray, query: np.ndarray, camera: Camera
) -> Path:
    """One trajectory per point through what was found frame by frame.

    Weights are inverse standard deviations, not variances: errors come in runs, and a run of
    doubtful positions still knows better than a curve drawn from sure ones far away.

    Args:
        xy: (N, T, 2) positions.
        sigma: (N, T) their standard deviations, pixels.
        frames: (N,) query frames.
        query: (N, 2) positions there, which are given.
        camera: global motion of the frames.
    """
    points = np.arange(len(frames))
    weight = 1 / np.hypot(SUREST, sigma)
    xy = xy.copy()
    xy[points, frames], weight[points, frames] = query, PINNED
    return Path(fit_curves(camera.stabilize(xy), weight), camera)


def bridge(xy: np.ndarray, known: np.ndarray, field: np.ndarray | None) -> np.ndarray:
    """Positions in every frame: the chain's where it is known, bridged in between.

    Without a field the bridge is a straight line in time; with one it is the field's path plus
    the interpolated difference of chain and field. Before the first and after the last known
    frame the difference is held.

    Args:
        xy: (N, T, 2) chain positions.
        known: (N, T) bool.
        field: (N, T, 2) or None.
    """
    offset = xy if field is None else xy - field
    bridged = _interpolated(offset, known)
    if field is not None:
        bridged = bridged + field
    return np.where(known[..., None], xy, bridged).astype(np.float32)


def _dead_ends(level: np.ndarray) -> np.ndarray:
    """`(N, T)` guesses before the first and after the last known frame of each point.

    In between a bridge knows better: there a guess follows whatever hides the point.
    """
    known = level > GUESSED
    before = np.maximum.accumulate(known, axis=1)
    after = np.maximum.accumulate(known[:, ::-1], axis=1)[:, ::-1]
    return (level == GUESSED) & ~(before & after)


def _with_field(
    xy: np.ndarray,
    weight: np.ndarray,
    deviation: np.ndarray,
    level: np.ndarray,
    field: Witness,
    frames: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse-variance mean with the field, where the chain is known and the two agree.

    How good the field is for a point shows where the chain is strict, and gets worse with time.
    Bridged frames already follow it.
    """
    growth = FIELD_GROWTH * np.sqrt(np.abs(np.arange(xy.shape[1]) - frames[:, None]))
    apart = np.linalg.norm(xy - field.xy, axis=-1)
    agree = (level > GUESSED) & (apart < 3 * np.hypot(deviation, FIELD_FLOOR + growth))
    typical = np.ma.median(np.ma.array(apart, mask=level != STRICT), axis=1).filled(UNKNOWN_APART)
    variance = BEST_FIELD**2 + (APART_SHARE * typical[:, None]) ** 2 + growth**2
    extra = np.where(agree, 1 / variance, 0)
    total = weight + extra
    return (weight[..., None] * xy + extra[..., None] * field.xy) / total[..., None], total


def _interpolated(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Linear interpolation in time `(N, T, 2)` between known entries, held at the ends."""
    times = np.arange(known.shape[1])
    before = np.maximum.accumulate(np.where(known, times, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, times, len(times))[:, ::-1], axis=1)[:, ::-1]
    first, last = np.where(before < 0, after, before), np.where(after == len(times), before, after)
    share = (times - first) / np.maximum(last - first, 1)
    rows = np.arange(len(known))[:, None]
    return values[rows, first] + share[..., None] * (values[rows, last] - values[rows, first])
