"""Sparse correspondences between distant frames, and the motion they imply for points near them.

A landmark is one correspondence: a feature match from preprocessing (between key frames), or
another tracker's track (between any frames). A point moves with the landmarks around it, provided
that they agree on the motion; where they are feature matches, the patches at both ends of the
motion must also be photo consistent.

Letters: n points, m landmarks, k neighbours. Raster pixels of the processing resolution.
"""

import numpy as np
from scipy.spatial import cKDTree

from omni.maths import rescale
from omni.store import Store
from omni.tracking.appearance import patch_correlation
from omni.tracking.tracks import Tracks

__all__ = ["Landmarks", "transfer"]

NEIGHBOURS = 6
REACH = 24.0
"""Landmarks farther from a point than this do not count, pixels at a short side of 256."""

FEWEST = 3
"""Least number of inliers."""

INLIER_RESIDUAL = 1.5
"""Residual in pixels up to which a landmark is an inlier of the local motion."""

INLIER_SHARE = 0.6
"""Least share of inliers among the landmarks within reach: below, a motion border runs through."""

LARGEST_GRADIENT = 0.7
"""Largest gradient of the local motion: beyond, the landmarks lie on two surfaces."""

LEAST_CORRELATION = 0.7
"""Least patch correlation between both ends of a motion found from feature matches."""

FEATURE_SIGMA = 0.5
"""Standard deviation of one matched feature, pixels."""

TRACK_SIGMA = 1.0
"""Standard deviation of an imported track that has none, original pixels."""

ITERATIONS = 3


class Landmarks:
    """Feature matches and imported tracks of a video.

    Args:
        store: finished preprocessing, with or without feature matches.
        tracks: another tracker's tracks over the same frames, None without.
    """

    def __init__(self, store: Store, tracks: Tracks | None = None):
        self._frames, self._reach = store.frames, REACH * min(store.size) / 256
        self._matches = {}
        if store.has("landmarks"):
            for (i, j), rows in zip(store.meta("landmarks")["pairs"], store.landmarks, strict=True):
                rows = rows[np.isfinite(rows[:, 0])]
                self._matches[i, j] = rows[:, :2], rows[:, 2:]
                self._matches[j, i] = rows[:, 2:], rows[:, :2]
        self._tracks = tracks
        if tracks is not None:
            self._xy = rescale(tracks.tracks, store.video_size, store.size)
            self._seen = tracks.visible & np.isfinite(tracks.tracks).all(-1)
            scale = store.size[0] / store.video_size[0]
            sigma = np.where(np.isfinite(tracks.sigma), tracks.sigma, TRACK_SIGMA)
            self._sigma = sigma * np.float32(scale)

    def sources(self, target: int) -> list[int]:
        """Key frames from which feature matches lead to `target`, ascending."""
        return sorted(source for source, other in self._matches if other == target)

    def follow(self, source: int, target: int, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in frame `target` of points `(n, 2)` of the key frame `source`.

        Returns:
            positions `(n, 2)` and standard deviations `(n,)`, inf where there is no estimate.
        """
        matches = self._matches[source, target]
        arrived, sigma = transfer(xy, *matches, FEATURE_SIGMA, self._reach)
        known = np.flatnonzero(np.isfinite(sigma))
        correlation = patch_correlation(self._frames, source, xy[known], target, arrived[known])
        sigma[known[correlation < LEAST_CORRELATION]] = np.inf
        return arrived, sigma

    @property
    def imported(self) -> bool:
        """Whether there are imported tracks."""
        return self._tracks is not None

    def observe(
        self, frames: np.ndarray, xy: np.ndarray, target: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions in frame `target` by imported tracks of points `(n, 2)` of `frames` `(n,)`.

        Returns:
            as `follow`.
        """
        arrived, sigma = xy.astype(np.float32).copy(), np.full(len(xy), np.inf, np.float32)
        for frame in np.unique(frames).tolist():
            rows, both = frames == frame, self._seen[:, frame] & self._seen[:, target]
            ends = self._xy[both, frame], self._xy[both, target]
            landmark_sigma = np.hypot(self._sigma[both, frame], self._sigma[both, target])
            arrived[rows], sigma[rows] = transfer(xy[rows], *ends, landmark_sigma, self._reach)
        return arrived, sigma


def transfer(
    xy: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    sigma: np.ndarray | float,
    reach: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Move points with the landmarks around them: a local affine map, robust and regularised.

    Args:
        xy: (n, 2) points.
        source: (m, 2) landmarks in the frame of the points.
        target: (m, 2) the same landmarks in the other frame.
        sigma: (m,) or one standard deviation of the landmarks, pixels.
        reach: pixels within which a landmark counts.

    Returns:
        (n, 2) float32 positions and (n,) float32 standard deviations: the inliers' residual plus
        their sigma, growing with the distance to the nearest; inf where there are too few.
    """
    arrived = xy.astype(np.float32).copy()
    deviation = np.full(len(xy), np.inf, np.float32)
    if len(source) < FEWEST or len(xy) == 0:
        return arrived, deviation
    nearest = cKDTree(source).query(xy, min(NEIGHBOURS, len(source)))
    distance, index = (np.asarray(value) for value in nearest)
    near = distance < reach
    offset, motion = source[index] - xy[:, None], target[index] - source[index]
    weight = near.astype(np.float64)
    for _ in range(ITERATIONS):
        _, _, residual = _local_motion(offset / reach, motion, weight)
        weight = near * (residual < np.maximum(INLIER_RESIDUAL, np.median(residual, 1)[:, None]))
    inlier = near & (residual < INLIER_RESIDUAL)
    # Falls off so fast that a landmark at the point itself dominates.
    weight = inlier / (0.01 + (distance / reach) ** 2)
    shift, gradient, residual = _local_motion(offset / reach, motion, weight)
    count = inlier.sum(1)
    found = (count >= FEWEST) & (count >= INLIER_SHARE * near.sum(1))
    found &= gradient < LARGEST_GRADIENT * reach
    scatter = np.sqrt((inlier * residual**2).sum(1) / np.maximum(count, 1))
    closest = np.where(inlier, distance, np.inf).min(1)
    # Neighbours are sorted by distance: the first inlier is the nearest.
    nearest_sigma = np.broadcast_to(sigma, len(source))[index[np.arange(len(xy)), inlier.argmax(1)]]
    total = scatter + nearest_sigma * (1 + np.where(found, closest, 0) / reach)
    deviation[found] = total[found]
    return arrived + shift.astype(np.float32), deviation


def _local_motion(
    offset: np.ndarray, motion: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacement `(n, 2)` at offset zero of weighted affine fits, norm `(n,)` of their linear
    part, and residuals `(n, k)`.
    """
    design = np.concatenate([np.ones((*offset.shape[:2], 1)), offset], axis=-1)
    normal = np.einsum("nk,nki,nkj->nij", weight, design, design)
    # A weak prior towards a translation keeps the fit defined for landmarks on a line.
    normal += np.diag([1e-6, 0.05, 0.05])
    solution = np.linalg.solve(normal, np.einsum("nk,nki,nkd->nid", weight, design, motion))
    fitted = np.einsum("nki,nid->nkd", design, solution)
    gradient = np.linalg.norm(solution[:, 1:], axis=(1, 2))
    return solution[:, 0], gradient, np.linalg.norm(fitted - motion, axis=-1)
