"""Tracks drawn on the frames they belong to.

Letters: T frames, N tracks, h x w the size of a picture. Drawing on a picture of another size than
the tracks' video is a pure scale, and a raster point x is drawn at the array index x - 0.5.
"""

import math
from collections.abc import Iterable, Iterator, Sized

import cv2
import numpy as np

from omni.errors import OmniError
from omni.maths import rescale
from omni.tracking import Tracks

__all__ = ["draw_tracks", "track_colors"]

# Bright, about equally light colours that stay apart on grass, sand, skin and tarmac.
_RAINBOW = np.array(
    [
        (255, 70, 90),
        (255, 145, 40),
        (255, 225, 60),
        (130, 230, 70),
        (30, 215, 175),
        (60, 165, 255),
        (145, 110, 255),
        (245, 90, 215),
    ],
    np.float32,
)
_SHIFT = 4
"""cv2 coordinates carry 4 fractional bits: 1/16 pixel."""

_Placed = tuple[np.ndarray, np.ndarray]
"""What `_place` returns."""


def track_colors(query_points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One colour per track: a rainbow down the frame, slanted so that a row varies too.

    A colour depends on the track's own query only, so that a subset of tracks, or the same
    queries tracked by another method, keep their colours.

    Args:
        query_points: (N, 3) t, y, x, raster pixels.
        size: (H, W) of the video they refer to.

    Returns:
        (N, 3) uint8 RGB.
    """
    _, y, x = np.asarray(query_points, np.float32).reshape(-1, 3).T
    place = np.clip(0.8 * y / size[0] + 0.2 * x / size[1], 0, 1) * (len(_RAINBOW) - 1)
    anchors = np.arange(len(_RAINBOW))
    channels = [np.interp(place, anchors, _RAINBOW[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def draw_tracks(
    frames: Iterable[np.ndarray],
    tracks: Tracks,
    trail: int = 12,
    colors: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Frames with every track drawn on them, one by one, anti-aliased to 1/16 pixel.

    A visible point is a disc with a dark rim, a hidden one a small ring. Trails fade with age;
    where a point was hidden they are thin and broken. Frames with a short side well below 480
    are enlarged by a whole factor, and every width follows the frame, so that lines are crisp.

    Args:
        frames: T pictures (h, w, 3) uint8 RGB, an array or an iterator, of any size: the tracks
            are scaled from `tracks.size` to it.
        tracks: N tracks over the same T frames; positions that are not finite are not drawn.
        trail: age in frames at which a trail has faded to a twentieth; 0 draws none.
        colors: (N, 3) uint8 RGB, default `track_colors`.

    Yields:
        (h', w', 3) uint8 RGB, T times.

    Raises:
        OmniError: the number of frames is not that of the tracks (an iterator: at its end).
    """
    num_frames = tracks.tracks.shape[1]
    if isinstance(frames, Sized):
        _check_length(len(frames), num_frames)
    if colors is None:
        colors = track_colors(tracks.query_points, tracks.size)
    return _overlay(frames, tracks, trail, np.asarray(colors))


def _check_length(given: int, expected: int) -> None:
    if given != expected:
        raise OmniError(
            f"the video has {given} frames but the tracks span {expected}: "
            "draw tracks on the frames they were made from"
        )


def _overlay(
    frames: Iterable[np.ndarray], tracks: Tracks, trail: int, colors: np.ndarray
) -> Iterator[np.ndarray]:
    """One premultiplied RGBA layer holds the trails and is dimmed a little every frame.

    So the cost of a frame does not depend on the length of the trails.
    """
    num_frames, count = tracks.tracks.shape[1], 0
    fade = 0.05 ** (1 / trail) if trail > 0 else 0.0
    layer: np.ndarray | None = None
    previous: _Placed | None = None
    for t, frame in enumerate(frames):
        if t >= num_frames:
            raise OmniError(f"the video has more frames than the {num_frames} of the tracks")
        canvas = _enlarge(frame)
        size = canvas.shape[:2]
        here = _place(rescale(tracks.tracks[:, t], tracks.size, size), size)
        if layer is None or previous is None:
            layer = np.zeros((*size, 4), np.uint8)
        elif trail > 0:
            # Truncated, not rounded: rounding would never bring a small value down to 0.
            layer = cv2.convertScaleAbs(layer, alpha=fade, beta=-0.5 * (fade < 1))
            seen = tracks.visible[:, t - 1] & tracks.visible[:, t]
            _draw_segments(layer, previous, here, seen, colors)
        marks = layer.copy()
        _draw_points(marks, here, tracks.visible[:, t], colors)
        yield _composite(canvas, marks)
        previous, count = here, t + 1
    _check_length(count, num_frames)


def _enlarge(frame: np.ndarray) -> np.ndarray:
    # Very elongated frames must not outgrow what video encoders take.
    factor = max(1, min(round(480 / min(frame.shape[:2])), 3840 // max(frame.shape[:2])))
    if factor == 1:
        return np.ascontiguousarray(frame)
    return cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def _place(xy: np.ndarray, size: tuple[int, int]) -> _Placed:
    """Raster points (N, 2) as cv2 fixed-point indices (N, 2) int, and (N,) whether drawable.

    cv2 puts a pixel's centre at its index, the raster half a pixel further. Far positions are
    clipped: cv2 overflows on them, and what they would draw is outside the frame anyway.
    """
    valid = np.isfinite(xy).all(1)
    reach = 4.0 * max(size)
    index = np.clip(np.where(valid[:, None], xy, 0) - 0.5, -reach, reach)
    return np.rint(index * (1 << _SHIFT)).astype(np.int64), valid


def _near(points: np.ndarray, size: tuple[int, int], margin: float) -> np.ndarray:
    """(N,) whether fixed-point positions lie within `margin` pixels of the picture."""
    low, high = -margin, np.array([size[1], size[0]]) + margin
    index = points / (1 << _SHIFT)
    return np.all((index >= low) & (index <= high), axis=1)


def _line_unit(size: tuple[int, int], count: int) -> float:
    """1 on a 480p frame; less where many tracks share it, so that the picture still shows."""
    spacing = math.sqrt(size[0] * size[1] / max(1, count))
    return min(min(size) / 480, spacing / 14)


def _draw_segments(
    layer: np.ndarray, start: _Placed, end: _Placed, seen: np.ndarray, colors: np.ndarray
) -> None:
    """Newest piece of each trail; (N,) `seen` where both its ends are visible."""
    (a, valid_a), (b, valid_b) = start, end
    size = layer.shape[:2]
    unit = _line_unit(size, len(seen))
    full, thin = max(1, round(2 * unit)), max(1, round(unit))
    # A hidden step is drawn half: consecutive steps make a dashed line.
    b = np.where(seen[:, None], b, (a + b) // 2)
    drawn = valid_a & valid_b & (a != b).any(1)
    drawn &= _near(a, size, 4) | _near(b, size, 4)
    for hidden in (True, False):
        rows = drawn & (seen != hidden)
        rgba = _premultiplied(colors[rows], 0.5 if hidden else 0.9)
        width = thin if hidden else full
        for p, q, color in zip(a[rows].tolist(), b[rows].tolist(), rgba, strict=True):
            cv2.line(layer, p, q, color, width, cv2.LINE_AA, _SHIFT)


def _draw_points(
    layer: np.ndarray, place: _Placed, visible: np.ndarray, colors: np.ndarray
) -> None:
    """Rings for hidden points, then discs with a dark rim for visible ones."""
    points, valid = place
    size = layer.shape[:2]
    unit = _line_unit(size, len(points))
    radius = 3.2 * unit
    one = 1 << _SHIFT
    disc, rim, ring = (round(r * one) for r in (radius, radius + 0.9 * unit, 0.8 * radius))
    shown = valid & _near(points, size, 2 * radius)
    hidden, width = shown & ~visible, max(1, round(unit))
    rgba = _premultiplied(colors[hidden], 0.75)
    for p, color in zip(points[hidden].tolist(), rgba, strict=True):
        cv2.circle(layer, p, ring, color, width, cv2.LINE_AA, _SHIFT)
    rgba = _premultiplied(colors[shown & visible], 1.0)
    for p, color in zip(points[shown & visible].tolist(), rgba, strict=True):
        cv2.circle(layer, p, rim, (14, 14, 14, 200), cv2.FILLED, cv2.LINE_AA, _SHIFT)
        cv2.circle(layer, p, disc, color, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _premultiplied(colors: np.ndarray, opacity: float) -> list[list[float]]:
    """(n, 3) RGB as n cv2 colours RGBA, colour already weighted with the opacity."""
    alpha = np.full((len(colors), 1), 255.0)
    return (np.concatenate([colors, alpha], 1) * opacity).round().tolist()


def _composite(frame: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Lay a premultiplied RGBA layer over an opaque frame."""
    rest = cv2.cvtColor(255 - layer[..., 3], cv2.COLOR_GRAY2RGB)
    under = cv2.multiply(frame, rest, scale=1 / 255)
    return cv2.add(under, np.ascontiguousarray(layer[..., :3]))
