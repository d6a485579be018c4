"""Photo consistency of tracks with their queries: patch correlation and colour distances.

Nothing here is learned. Letters: K candidates, N points, T frames, P samples per patch. Raster
pixels of the processing resolution.
"""

import cv2
import numpy as np

__all__ = [
    "color_contrast",
    "color_differences",
    "patch_correlation",
    "sample_colors",
    "similarity",
]

RADIUS, STEP = 6, 1.5
"""Patches of 13 x 13 samples, 1.5 pixels apart at a short side of 256."""

NEAR_RADIUS = 2
"""Small patches of 5 x 5 samples, one pixel apart at a short side of 256."""

LARGEST_DIFFERENCE = 30.0
"""Grey levels at which differences are clamped, so that occluders do not dominate the mean."""

COLOR_SCALE = 8.0
"""Grey levels from the centre of its patch at which the weight of a sample is 1 / e."""

PATCHES = 1024
"""Patches compared at once: they stay in the processor's cache, and few points are one call."""

_LINE_SAMPLES = 8

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def similarity(
    frames: np.ndarray, xy: np.ndarray, query_frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Patch correlation and colour distance of every point with its query.

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
    template_color = np.empty((count, 3), np.float32)
    for t in np.unique(query_frames):
        rows = np.flatnonzero(query_frames == t)
        template[rows], template_color[rows] = _patches(frames[t], xy[rows, t], offsets)
    correlation = np.empty((count, num_frames), np.float32)
    distance = np.empty((count, num_frames), np.float32)
    for t in range(num_frames):
        patch, color = _patches(frames[t], xy[:, t], offsets)
        correlation[:, t] = (patch * template).sum(-1)
        distance[:, t] = np.linalg.norm(color - template_color, axis=-1)
    return correlation, distance


def patch_correlation(
    frames: np.ndarray, source: int, xy: np.ndarray, target: int, other: np.ndarray
) -> np.ndarray:
    """Correlation `(n,)` of the patches around points `(n, 2)` of two frames (see `similarity`)."""
    offsets = _offsets(frames, RADIUS, STEP)
    first, _ = _patches(frames[source], xy, offsets)
    second, _ = _patches(frames[target], other, offsets)
    return (first * second).sum(-1)


def color_differences(
    frames: np.ndarray, xy: np.ndarray, query_frames: np.ndarray, reliable: np.ndarray
) -> np.ndarray:
    """Colour distances between the positions of candidates and the point.

    The reference colours are those of the query, and those of the reliable frame nearest in time:
    illumination and pose change.

    Args:
        frames: (T, h, w, 3) uint8.
        xy: (K, N, T, 2) positions; the first candidate is at the query in the query frame.
        query_frames: (N,).
        reliable: (N, T) bool, frames in which the first candidate is reliable; the query frame is
            one of them.

    Returns:
        (5, K, N, T) float32 grey levels. From the query: at the centre, mean over a small patch,
        and mean over it weighted towards samples coloured like the centre. From the nearest
        reliable frame: the first two.
    """
    num_candidates, count, num_frames = xy.shape[:3]
    offsets = _offsets(frames, NEAR_RADIUS, 1.0)
    middle, points = len(offsets) // 2, np.arange(count)
    patches = np.stack([sample_colors(frames[t], xy[0, :, t], offsets) for t in range(num_frames)])
    template = patches[query_frames, points]
    center = np.broadcast_to(template[:, [middle]], template.shape)
    weight = np.exp(-_color_distance(template, center) / COLOR_SCALE)
    weight /= weight.sum(1, keepdims=True)
    times, together = np.arange(num_frames), max(1, PATCHES // max(1, count))
    result = np.empty((5, num_candidates, count, num_frames), np.float32)
    for t in times:
        gap = np.where(reliable & (times != t), np.abs(times - t), num_frames)
        nearest = np.where(reliable.sum(1) > 1, gap.argmin(1), query_frames)
        recent = patches[nearest, points]
        for first in range(0, num_candidates, together):
            some = xy[first : first + together, :, t]
            colors = sample_colors(frames[t], some.reshape(-1, 2), offsets)
            shape = (*some.shape[:2], len(offsets))
            from_query, from_recent = (
                np.minimum(_color_distance(colors, tiled), LARGEST_DIFFERENCE).reshape(shape)
                for tiled in (np.tile(patch, (len(some), 1, 1)) for patch in (template, recent))
            )
            result[:, first : first + together, :, t] = (
                from_query[..., middle],
                from_query.mean(-1),
                (from_query * weight).sum(-1),
                from_recent[..., middle],
                from_recent.mean(-1),
            )
    return result


def _color_distance(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute difference `(n, P)` float32 over the channels of uint8 colours `(n, P, 3)`."""
    # Memory traffic dominates the time taken, and bytes need a quarter of that of floats.
    return cv2.transform(cv2.absdiff(colors, others).astype(np.float32), np.full((1, 3), 1 / 3))


def color_contrast(
    frames: np.ndarray, xy: np.ndarray, query_frames: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """Colour distances in the query frame between queries and other points.

    Args:
        frames: (T, h, w, 3) uint8.
        xy: (N, 2) queries.
        query_frames: (N,).
        offset: (K, N, 2) from the queries to the other points.

    Returns:
        (2, K, N) float32 grey levels: the maximum along the line to the other point, and the value
        at its end.
    """
    count = len(xy)
    fraction = np.linspace(0, 1, _LINE_SAMPLES, dtype=np.float32)[:, None, None, None]
    samples = (xy + fraction * offset).transpose(2, 0, 1, 3)
    result = np.empty((2, len(offset), count), np.float32)
    for t in np.unique(query_frames):
        rows = np.flatnonzero(query_frames == t)
        image = np.ascontiguousarray(frames[t])
        colors = sample_colors(image, samples[rows].reshape(-1, 2), np.zeros((1, 2), np.float32))
        colors = colors.reshape(len(rows), _LINE_SAMPLES, -1, 3).astype(np.float32)
        distance = np.abs(colors - colors[:, :1, :1]).mean(-1)
        result[0, :, rows], result[1, :, rows] = distance.max(1), distance[:, -1]
    return result


def _offsets(frames: np.ndarray, radius: int, step: float) -> np.ndarray:
    """Samples `(P, 2)` of a patch relative to its centre, `step` pixels apart at 256."""
    ticks = np.arange(-radius, radius + 1, dtype=np.float32) * step * min(frames.shape[1:3]) / 256
    return np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)


def _patches(
    image: np.ndarray, xy: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm zero-mean grey patches `(n, P)` and mean colours `(n, 3)` around points."""
    colors = sample_colors(image, xy, offsets)
    gray = colors @ _GRAY
    gray -= gray.mean(-1, keepdims=True)
    # Two grey levels of texture are noise: they must not be amplified to full contrast.
    norm = np.maximum(np.linalg.norm(gray, axis=-1, keepdims=True), 2 * np.sqrt(len(offsets)))
    return gray / norm, colors.mean(1)


def sample_colors(image: np.ndarray, xy: np.ndarray, offsets: np.ndarray) -> np.ndarray:
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
