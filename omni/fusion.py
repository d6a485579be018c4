"""Two witnesses to one trajectory: the chain of flows and the field.

The chain is exact to a fraction of a pixel while every link closes, and knows when it is lost. The
field always answers, smoothly, from everything it saw. So the chain says where a point is while it
is trusted; the field bridges the rest, shifted to meet the chain at both ends; and where the two
contradict each other the point is not called visible.

Letters: N points, T frames. Raster pixels of the processing resolution.
"""

from dataclasses import dataclass

import numpy as np

from omni.integration import LOOSE, LOST, STRICT, Chains
from omni.smoothing import Curves, fit_curves

__all__ = ["Witness", "bridge", "settle"]

DOUBT = 12.0
"""Chain and field this far apart contradict each other, pixels at a short side of 256."""

FIELD_FLOOR, FIELD_GROWTH = 0.5, 0.25
"""Standard deviation of the field: pixels, and pixels per root frame from the query."""

PINNED = 100.0
"""Weight of the query itself: its position is given, not measured."""


@dataclass
class Witness:
    """What the field says: xy (N, T, 2) and visibility (N, T)."""

    xy: np.ndarray
    visibility: np.ndarray


def settle(
    chains: Chains, frames: np.ndarray, size: tuple[int, int], field: Witness | None
) -> tuple[Curves, np.ndarray, np.ndarray]:
    """One trajectory from both witnesses.

    Args:
        chains: integrated flows of N points.
        frames: (N,) query frames.
        size: (h, w) processing size.
        field: the field's account; None before any fit.

    Returns:
        curves in time, (N, T) standard deviation per axis in pixels, (N, T) visibility.
    """
    level, points = chains.level.T, np.arange(len(frames))
    deviation = np.where(np.isfinite(chains.sigma.T), chains.sigma.T, 0)
    xy = bridge(chains.xy.transpose(1, 0, 2), level, None if field is None else field.xy)
    weight = np.select(
        [level == STRICT, level == LOOSE],
        [1 / (0.09 + deviation**2), 0.1 / (4 + deviation**2)],
        1e-4 if field is None else 0.05,
    )
    if field is not None:
        xy, weight = _with_field(xy, weight, deviation, field, frames)
    weight[points, frames] = PINNED
    curves = fit_curves(xy, weight)
    visibility = np.select([level == STRICT, level == LOOSE], [0.85, 0.3], 0.1)
    if field is not None:
        apart = np.linalg.norm(chains.xy.transpose(1, 0, 2) - field.xy, axis=-1)
        doubt = DOUBT * min(size) / 256
        visibility = np.where(apart > doubt, 0.5 * visibility, visibility)
    visibility[points, frames] = 1
    return curves, _spread(deviation, level), visibility.astype(np.float32)


def bridge(xy: np.ndarray, level: np.ndarray, field: np.ndarray | None) -> np.ndarray:
    """Positions in every frame: the chain's where it is known, bridged in between.

    Without a field the bridge is a straight line in time; with one it is the field's path plus
    the interpolated difference of chain and field. Before the first and after the last known
    frame the difference is held.

    Args:
        xy: (N, T, 2) chain positions.
        level: (N, T) levels of trust, known above LOST.
        field: (N, T, 2) or None.
    """
    known = level > LOST
    offset = xy if field is None else xy - field
    bridged = _interpolated(offset, known)
    if field is not None:
        bridged = bridged + field
    return np.where(known[..., None], xy, bridged).astype(np.float32)


def _with_field(
    xy: np.ndarray, weight: np.ndarray, deviation: np.ndarray, field: Witness, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse-variance mean with the field, where the two agree; its error grows with time."""
    times = np.arange(xy.shape[1])
    spread = FIELD_FLOOR + FIELD_GROWTH * np.sqrt(np.abs(times - frames[:, None]))
    apart = np.linalg.norm(xy - field.xy, axis=-1)
    extra = np.where(apart < 3 * np.hypot(deviation, spread), 1 / spread**2, 0)
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


def _spread(deviation: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Standard deviation per axis: the chain's while strict, growing with time since then."""
    times = np.arange(level.shape[1])
    strict = level == STRICT
    before = np.maximum.accumulate(np.where(strict, times, -(10**6)), axis=1)
    after = np.minimum.accumulate(np.where(strict, times, 10**6)[:, ::-1], axis=1)[:, ::-1]
    away = np.minimum(times - before, after - times)
    return np.hypot(deviation, 2.0 * away).astype(np.float32)
