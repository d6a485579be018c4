"""Fused paths: one trajectory per point from its chain of flows and the field's estimate.

A chain is exact to a fraction of a pixel while every link is cycle consistent, and detects where
it is lost. The field gives an estimate in every frame, smooth and less exact. So a fused path
follows the chain where it is LOOSE or STRICT; gaps are bridged by the field, shifted to meet the
chain at both ends; before the first and after the last such frame the UNVERIFIED chain extends it.

Letters: N points, T frames, M times. Raster pixels of the processing resolution.
"""

from dataclasses import dataclass

import numpy as np

from omni.maths import Camera
from omni.tracking.integration import LOOSE, STRICT, UNVERIFIED, Chains
from omni.tracking.smoothing import Curves, fit_curves

__all__ = ["FieldEstimate", "Path", "bridge", "bridged_path", "fused_path", "smoothed_path"]

FIELD_FLOOR, FIELD_GROWTH = 0.5, 0.2
"""Usual error of the field: pixels, and pixels per square root of the frames from the query."""

FIELD_SIGMA, RESIDUAL_SHARE, UNKNOWN_RESIDUAL = 0.3, 1.5, 2.0
"""Standard deviation of the field for one point, which grows likewise: its floor in pixels; its
share of the median distance between the field and the point's strict chain; that distance in
pixels where the chain is never strict."""

SMALLEST_SIGMA = 0.3
"""Least standard deviation that a position is weighted with, pixels."""

QUERY_WEIGHT = 100.0
"""Weight of the query itself: its position is given, not measured."""


@dataclass(frozen=True)
class Path:
    """Trajectories of N points: splines in the stabilised plane, and the camera's motion.

    The splines begin at frame `start`.
    """

    curves: Curves
    camera: Camera
    start: int = 0

    def at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, M, 2)` in processing pixels at `(M,)` real times in frames."""
        return self.camera.restore(self.curves.at(times - self.start), times)

    @classmethod
    def joined(cls, parts: list["Path"]) -> "Path":
        """The trajectories of all parts, which share everything else."""
        first = parts[0]
        control = np.concatenate([part.curves.control for part in parts])
        return cls(Curves(control, first.curves.spacing), first.camera, first.start)

    def each_at(self, times: np.ndarray) -> np.ndarray:
        """Positions `(N, 2)` in processing pixels, every point at its own one of `(N,)` times."""
        stabilised = self.curves.each_at(times - self.start)
        return self.camera.restore(stabilised[None], times)[0]


@dataclass
class FieldEstimate:
    """The field's estimate of N points: positions and visibility in T frames.

    Attributes:
        xy: (N, T, 2) float32 processing pixels.
        visibility: (N, T) float32 probability that the point is visible.
    """

    xy: np.ndarray
    visibility: np.ndarray


def fused_path(
    chains: Chains, frames: np.ndarray, camera: Camera, field: FieldEstimate | None
) -> Path:
    """One trajectory per point from its chain and the field's estimate.

    Bridging and smoothing take place in the stabilised plane, from which the camera's shake, which
    is real and fast, has been removed.

    Args:
        chains: integrated flows of N points.
        frames: (N,) query frames.
        camera: global motion of the frames.
        field: the field's estimate; None before any fit.
    """
    level, points = chains.level.T, np.arange(len(frames))
    deviation = np.where(np.isfinite(chains.sigma.T), chains.sigma.T, 0)
    measured = camera.stabilize(chains.xy.transpose(1, 0, 2))
    if field is not None:
        field = FieldEstimate(camera.stabilize(field.xy), field.visibility)
    extension = _extension(level)
    xy = bridge(measured, (level > UNVERIFIED) | extension, None if field is None else field.xy)
    weight = np.select(
        [level == STRICT, level == LOOSE, extension],
        [1 / (0.09 + deviation**2), 0.3 / (4 + deviation**2), 0.02],
        1e-4 if field is None else 0.05,
    )
    if field is not None:
        xy, weight = _with_field(xy, weight, deviation, level, field, frames)
    xy[points, frames], weight[points, frames] = measured[points, frames], QUERY_WEIGHT
    return Path(fit_curves(xy, weight), camera)


def bridged_path(chains: Chains, camera: Camera) -> np.ndarray:
    """Positions `(N, T, 2)` of chains, gaps bridged by straight lines in the stabilised plane.

    What `fused_path` gives without a field, but neither smoothed nor defined between frames.
    """
    level = chains.level.T
    measured = camera.stabilize(chains.xy.transpose(1, 0, 2))
    xy = bridge(measured, (level > UNVERIFIED) | _extension(level), None)
    return camera.restore(xy, np.arange(xy.shape[1]))


def smoothed_path(
    xy: np.ndarray,
    sigma: np.ndarray,
    frames: np.ndarray,
    query: np.ndarray,
    camera: Camera,
    start: int = 0,
) -> Path:
    """One smooth trajectory per point through positions estimated frame by frame.

    Weights are inverse standard deviations, not variances: errors of consecutive frames are
    correlated, and a run of uncertain positions is still more accurate than a spline through
    reliable ones far away in time.

    Args:
        xy: (N, M, 2) positions in consecutive frames, processing pixels.
        sigma: (N, M) their standard deviations, pixels.
        frames: (N,) query frames, which may lie outside of these.
        query: (N, 2) query positions, which are exact.
        camera: global motion.
        start: the first of the M frames.
    """
    count = xy.shape[1]
    points = np.flatnonzero((frames >= start) & (frames < start + count))
    given = points, frames[points] - start
    weight = 1 / np.hypot(SMALLEST_SIGMA, sigma)
    xy = xy.copy()
    xy[given], weight[given] = query[points], QUERY_WEIGHT
    return Path(fit_curves(camera.stabilize(xy, start), weight), camera, start)


def bridge(xy: np.ndarray, known: np.ndarray, field: np.ndarray | None) -> np.ndarray:
    """Positions in every frame: the chain's where it is known, bridged in between.

    Without a field the bridge is a straight line in time; with one it is the field's path plus
    the interpolated difference of chain and field. Before the first and after the last known
    frame the difference is held.

    Args:
        xy: (N, T, 2) chain positions.
        known: (N, T) bool, frames whose chain position is used.
        field: (N, T, 2) positions of the field, or None.

    Returns:
        (N, T, 2) float32 positions.
    """
    offset = xy if field is None else xy - field
    bridged = _interpolated(offset, known)
    if field is not None:
        bridged = bridged + field
    return np.where(known[..., None], xy, bridged).astype(np.float32)


def _extension(level: np.ndarray) -> np.ndarray:
    """`(N, T)` bool: UNVERIFIED states before the first or after the last known frame.

    Between known frames a bridge is more accurate: there an unverified chain follows the occluder.
    """
    known = level > UNVERIFIED
    before = np.maximum.accumulate(known, axis=1)
    after = np.maximum.accumulate(known[:, ::-1], axis=1)[:, ::-1]
    return (level == UNVERIFIED) & ~(before & after)


def _with_field(
    xy: np.ndarray,
    weight: np.ndarray,
    deviation: np.ndarray,
    level: np.ndarray,
    field: FieldEstimate,
    frames: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse-variance mean with the field where the chain is known and the two agree.

    The field's variance for a point is measured where the chain is strict, and grows with the time
    from the query. Bridged frames already follow the field.
    """
    growth = FIELD_GROWTH * np.sqrt(np.abs(np.arange(xy.shape[1]) - frames[:, None]))
    residual = np.linalg.norm(xy - field.xy, axis=-1)
    agrees = (level > UNVERIFIED) & (residual < 3 * np.hypot(deviation, FIELD_FLOOR + growth))
    strict = np.ma.array(residual, mask=level != STRICT)
    typical = np.ma.median(strict, axis=1).filled(UNKNOWN_RESIDUAL)
    variance = FIELD_SIGMA**2 + (RESIDUAL_SHARE * typical[:, None]) ** 2 + growth**2
    field_weight = np.where(agrees, 1 / variance, 0)
    total = weight + field_weight
    return (weight[..., None] * xy + field_weight[..., None] * field.xy) / total[..., None], total


def _interpolated(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Linear interpolation in time `(N, T, 2)` between known entries, held at the ends."""
    times = np.arange(known.shape[1])
    before = np.maximum.accumulate(np.where(known, times, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, times, len(times))[:, ::-1], axis=1)[:, ::-1]
    first, last = np.where(before < 0, after, before), np.where(after == len(times), before, after)
    share = (times - first) / np.maximum(last - first, 1)
    rows = np.arange(len(known))[:, None]
    return values[rows, first] + share[..., None] * (values[rows, last] - values[rows, first])
