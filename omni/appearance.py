"""Does the place still look like the query? Patch similarity without any weights.

Letters: N points, T frames, P samples per patch. Raster pixels of the processing resolution.
"""

import cv2
import numpy as np

__all__ = ["alike", "similarity"]

RADIUS, STEP = 6, 1.5
"""Patches of 13 x 13 samples, 1.5 pixels apart at a short side of 256."""

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def similarity(
    frames: np.ndarray, xy: np.ndarray, query_frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare the patch around each point with the patch around its query.

    Args:
        frames: (T, h, w, 3) uint8.
        xy: (N, T, 2) positions.
        query_frames: (N,) frame of each point's template.

    Returns:
        (N, T) zero-mean normalised cross-correlation in [-1, 1], 0 for flat patches, and (N, T)
        distance of the patches' mean colours in grey levels.
    """
    count, num_frames = xy.shape[:2]
    offsets = _offsets(frames)
    template = np.empty((count, len(offsets)), np.float32)
    tint = np.empty((count, 3), np.float32)
    for t in np.unique(query_frames):
        rows = np.flatnonzero(query_frames == t)
        template[rows], tint[rows] = _patches(frames[t], xy[rows, t], offsets)
    correlation = np.empty((count, num_frames), np.float32)
    distance = np.empty((count, num_frames), np.float32)
    for t in range(num_frames):
        patch, color = _patches(frames[t], xy[:, t], offsets)
        correlation[:, t] = (patch * template).sum(-1)
        distance[:, t] = np.linalg.norm(color - tint, axis=-1)
    return correlation, distance


def alike(
    frames: np.ndarray, source: int, xy: np.ndarray, target: int, other: np.ndarray
) -> np.ndarray:
    """Correlation `(n,)` of the patches around points `(n, 2)` of two frames, as `similarity`."""
    offsets = _offsets(frames)
    first, _ = _patches(frames[source], xy, offsets)
    second, _ = _patches(frames[target], other, offsets)
    return (first * second).sum(-1)


def _offsets(frames: np.ndarray) -> np.ndarray:
    """Samples `(P, 2)` of a patch relative to its centre."""
    ticks = np.arange(-RADIUS, RADIUS + 1, dtype=np.float32) * STEP * min(frames.shape[1:3]) / 256
    return np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)


def _patches(image: np.ndarray, xy: np.ndarray, offsets: np.ndarray):
    """Unit-norm zero-mean grey patches `(n, P)` and mean colours `(n, 3)` around points."""
    image = np.ascontiguousarray(image)
    # OpenCV refuses maps of no rows and of more than 2^15.
    parts = [_colors(image, xy[i : i + 16384], offsets) for i in range(0, len(xy), 16384)]
    colors = np.concatenate(parts) if parts else np.zeros((0, len(offsets), 3), np.float32)
    gray = colors @ _GRAY
    gray -= gray.mean(-1, keepdims=True)
    # Two grey levels of texture are noise: they must not be blown up to full contrast.
    norm = np.maximum(np.linalg.norm(gray, axis=-1, keepdims=True), 2 * np.sqrt(len(offsets)))
    return gray / norm, colors.mean(1)


def _colors(image: np.ndarray, xy: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    where = (xy[:, None] + offsets - 0.5).astype(np.float32)
    x, y = where[..., 0], where[..., 1]
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(
        np.float32
    )
