"""Does the place still look like the query? Patch similarity without any weights.

Letters: W witnesses, N points, T frames, P samples per patch. Raster pixels of the processing
resolution.
"""

import cv2
import numpy as np

__all__ = ["alike", "contrast", "differences", "similarity"]

RADIUS, STEP = 6, 1.5
"""Patches of 13 x 13 samples, 1.5 pixels apart at a short side of 256."""

NEAR_RADIUS = 2
"""Small patches of 5 x 5 samples, one pixel apart at a short side of 256."""

LARGEST_DIFFERENCE = 30.0
"""Grey levels beyond which a sample is simply wrong: occluders must not rule the mean."""

OWN_COLOR = 8.0
"""Grey levels by which a sample differs from the point itself to count 1 / e in its patch."""

_STOPS = 8

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
    offsets = _offsets(frames, RADIUS, STEP)
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
    offsets = _offsets(frames, RADIUS, STEP)
    first, _ = _patches(frames[source], xy, offsets)
    second, _ = _patches(frames[target], other, offsets)
    return (first * second).sum(-1)


def differences(
    frames: np.ndarray, xy: np.ndarray, query_frames: np.ndarray, sure: np.ndarray
) -> np.ndarray:
    """How far the colours that witnesses lead to are from those of the point.

    Its colours are those of the query, and those of the sure frame that is nearest in time: light
    and pose change.

    Args:
        frames: (T, h, w, 3) uint8.
        xy: (W, N, T, 2) positions; the first witness is at the query in its frame.
        query_frames: (N,).
        sure: (N, T) bool, where the first witness is to be believed; in query frames at least.

    Returns:
        (5, W, N, T) grey levels: from the query at the point, over a small patch, and over those of
        its samples that are coloured like the point; from the nearest sure frame, the first two.
    """
    witnesses, count, num_frames = xy.shape[:3]
    offsets = _offsets(frames, NEAR_RADIUS, 1.0)
    middle, points = len(offsets) // 2, np.arange(count)
    own = np.stack([_colors(frames[t], xy[0, :, t], offsets) for t in range(num_frames)])
    template = own[query_frames, points]
    center = np.broadcast_to(template[:, [middle]], template.shape)
    alike = np.exp(-_apart(template, center) / OWN_COLOR)
    alike /= alike.sum(1, keepdims=True)
    times = np.arange(num_frames)
    result = np.empty((5, witnesses, count, num_frames), np.float32)
    for t in times:
        others = np.where(sure & (times != t), np.abs(times - t), num_frames)
        recent = own[np.where(sure.sum(1) > 1, others.argmin(1), query_frames), points]
        for w in range(witnesses):
            colors = _colors(frames[t], xy[w, :, t], offsets)
            off, now = (
                np.minimum(_apart(colors, patch), LARGEST_DIFFERENCE)
                for patch in (template, recent)
            )
            values = off[:, middle], off.mean(1), (off * alike).sum(1), now[:, middle], now.mean(1)
            result[:, w, :, t] = values
    return result


def _apart(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute difference `(n, P)` float32 over the channels of uint8 colours `(n, P, 3)`."""
    # Bytes are a quarter of the traffic of floats, which is what this takes its time for.
    return cv2.transform(cv2.absdiff(colors, others).astype(np.float32), np.full((1, 3), 1 / 3))


def contrast(
    frames: np.ndarray, xy: np.ndarray, query_frames: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """How far colours around queries are from theirs, in the query frame.

    Args:
        frames: (T, h, w, 3) uint8.
        xy: (N, 2) queries.
        query_frames: (N,).
        offset: (W, N, 2) to other points.

    Returns:
        (2, W, N) grey levels: the most on the way there, and there.
    """
    count = len(xy)
    stops = np.linspace(0, 1, _STOPS, dtype=np.float32)[:, None, None, None]
    places = (xy + stops * offset).transpose(2, 0, 1, 3)
    result = np.empty((2, len(offset), count), np.float32)
    for t in np.unique(query_frames):
        rows = np.flatnonzero(query_frames == t)
        image = np.ascontiguousarray(frames[t])
        colors = _colors(image, places[rows].reshape(-1, 2), np.zeros((1, 2), np.float32))
        colors = colors.reshape(len(rows), _STOPS, -1, 3).astype(np.float32)
        off = np.abs(colors - colors[:, :1, :1]).mean(-1)
        result[0, :, rows], result[1, :, rows] = off.max(1), off[:, -1]
    return result


def _offsets(frames: np.ndarray, radius: int, step: float) -> np.ndarray:
    """Samples `(P, 2)` of a patch relative to its centre, `step` pixels apart at 256."""
    ticks = np.arange(-radius, radius + 1, dtype=np.float32) * step * min(frames.shape[1:3]) / 256
    return np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)


def _patches(image: np.ndarray, xy: np.ndarray, offsets: np.ndarray):
    """Unit-norm zero-mean grey patches `(n, P)` and mean colours `(n, 3)` around points."""
    colors = _colors(image, xy, offsets)
    gray = colors @ _GRAY
    gray -= gray.mean(-1, keepdims=True)
    # Two grey levels of texture are noise: they must not be blown up to full contrast.
    norm = np.maximum(np.linalg.norm(gray, axis=-1, keepdims=True), 2 * np.sqrt(len(offsets)))
    return gray / norm, colors.mean(1)


def _colors(image: np.ndarray, xy: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Bilinear colours `(n, P, 3)` uint8 of the patches around points."""
    image = np.ascontiguousarray(image)
    x, y = (
        np.add.outer(xy[:, axis], offsets[:, axis] - 0.5).astype(np.float32, copy=False)
        for axis in range(2)
    )
    colors = np.empty((*x.shape, 3), np.uint8)
    # OpenCV refuses maps of no rows and of more than 2^15.
    for start in range(0, len(xy), 16384):
        rows = slice(start, start + 16384)
        colors[rows] = cv2.remap(
            image, x[rows], y[rows], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    return colors
