"""Drawing: track overlays, flow, depth and error pictures, labels, small animations.

Pure functions from arrays to uint8 RGB arrays (or encoded bytes); writing files is the caller's
job. Letters: T frames, N tracks, h x w the size of a picture.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omni.coords import rescale
from omni.errors import OmniError
from omni.tracks import Tracks

__all__ = [
    "animation_png",
    "depth_to_image",
    "draw_label",
    "draw_tracks",
    "error_to_image",
    "flow_to_image",
    "side_by_side",
    "track_colors",
]

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
_UNKNOWN = (128, 128, 128)
_SHIFT = 4
"""cv2 coordinates carry 4 fractional bits: 1/16 pixel."""
_ANIMATION_WIDTH, _ANIMATION_FRAMES, _ANIMATION_BYTES = 480, 30, 2_000_000


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
    if hasattr(frames, "__len__"):
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
    layer = previous = None
    for t, frame in enumerate(frames):
        if t >= num_frames:
            raise OmniError(f"the video has more frames than the {num_frames} of the tracks")
        canvas = _enlarge(frame)
        size = canvas.shape[:2]
        here = _place(rescale(tracks.tracks[:, t], tracks.size, size), size)
        if layer is None:
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
    factor = max(1, round(480 / min(frame.shape[:2])))
    if factor == 1:
        return np.ascontiguousarray(frame)
    return cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def _place(xy: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
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
    return ((index >= low) & (index <= high)).all(1)


def _line_unit(size: tuple[int, int], count: int) -> float:
    """1 on a 480p frame; less where many tracks share it, so that the picture still shows."""
    spacing = math.sqrt(size[0] * size[1] / max(1, count))
    return min(min(size) / 480, spacing / 14)


def _draw_segments(layer, start, end, seen, colors) -> None:
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


def _draw_points(layer, place, visible, colors) -> None:
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


def flow_to_image(flow: np.ndarray, max_motion: float | None = None) -> np.ndarray:
    """Flow in the Middlebury colours: hue is direction, white is no motion.

    Args:
        flow: (h, w, 2) x, y pixels; values that are not finite come out grey.
        max_motion: length in pixels drawn fully saturated, longer ones are clipped; default the
            99th percentile.

    Returns:
        (h, w, 3) uint8 RGB.

    Source: Baker et al., A Database and Evaluation Methodology for Optical Flow, ICCV 2007.
    """
    known = np.isfinite(flow).all(-1)
    x, y = np.moveaxis(np.where(known[..., None], flow, 0).astype(np.float32), -1, 0)
    length = np.hypot(x, y)
    if max_motion is None:
        max_motion = np.percentile(length[known], 99) if known.any() else 1.0
    length = np.minimum(length / max(float(max_motion), 1e-6), 1)[..., None]
    wheel = _color_wheel()
    turn = (np.arctan2(-y, -x) / np.pi + 1) / 2 * (len(wheel) - 1)
    below = np.floor(turn).astype(np.int64)
    part = (turn - below)[..., None]
    hue = wheel[below] * (1 - part) + wheel[(below + 1) % len(wheel)] * part
    image = np.rint(255 * (1 - length * (1 - hue))).astype(np.uint8)
    image[~known] = _UNKNOWN
    return image


def _color_wheel() -> np.ndarray:
    """(55, 3) float in [0, 1]: the Middlebury wheel, steps per arc chosen by eye there."""
    red, green, blue = 0, 1, 2
    # Each arc: steps, channel that stays full, channel that ramps, up or down.
    arcs = (
        (15, red, green, 1),
        (6, green, red, -1),
        (4, green, blue, 1),
        (11, blue, green, -1),
        (13, blue, red, 1),
        (6, red, blue, -1),
    )
    rows = []
    for steps, full, ramp, sign in arcs:
        arc = np.zeros((steps, 3), np.float32)
        arc[:, full] = 1
        rise = np.arange(steps, dtype=np.float32) / steps
        arc[:, ramp] = rise if sign > 0 else 1 - rise
        rows.append(arc)
    return np.concatenate(rows)


def depth_to_image(depth: np.ndarray) -> np.ndarray:
    """Depth (h, w), larger is farther, as (h, w, 3) uint8 RGB: near is bright, far is dark.

    The range is that of the 2nd to 98th percentile; values that are not finite come out grey.
    """
    known = depth[np.isfinite(depth)]
    near, far = np.percentile(known, (2, 98)) if known.size else (0.0, 1.0)
    return _paint((far - depth) / max(far - near, 1e-6), cv2.COLORMAP_INFERNO)


def error_to_image(error: np.ndarray, max_error: float | None = None) -> np.ndarray:
    """Error magnitude (h, w), any unit, as (h, w, 3) uint8 RGB: 0 is dark, large is bright.

    Args:
        error: (h, w), at least 0; values that are not finite come out grey.
        max_error: error drawn brightest; default the 98th percentile.
    """
    known = error[np.isfinite(error)]
    if max_error is None:
        max_error = np.percentile(known, 98) if known.size else 1.0
    return _paint(error / max(float(max_error), 1e-6), cv2.COLORMAP_VIRIDIS)


def _paint(value: np.ndarray, colormap: int) -> np.ndarray:
    """(h, w) values, 0 to 1 after clipping, through a cv2 colour map; grey where not finite."""
    known = np.isfinite(value)
    level = np.rint(255 * np.clip(np.where(known, value, 0), 0, 1)).astype(np.uint8)
    image = cv2.cvtColor(cv2.applyColorMap(level, colormap), cv2.COLOR_BGR2RGB)
    image[~known] = _UNKNOWN
    return image


def draw_label(image: np.ndarray, text: str) -> np.ndarray:
    """Copy (h, w, 3) uint8 with white `text` on a darkened patch in the top-left corner."""
    size = max(12, round(min(image.shape[:2]) * 0.045))
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    pad = size // 2
    high, wide = math.ceil(bottom - top) + 2 * pad, math.ceil(right - left) + 2 * pad
    out = image.copy()
    out[:high, :wide] = (out[:high, :wide] * 0.35).astype(np.uint8)
    picture = Image.fromarray(out)
    ImageDraw.Draw(picture).text((pad - left, pad - top), text, (255, 255, 255), font)
    return np.array(picture)


def side_by_side(images: Sequence[np.ndarray], labels: Sequence[str] = ()) -> np.ndarray:
    """Pictures in one row, brought to the height of the tallest, with a narrow dark gap.

    Args:
        images: (h, w, 3) uint8 RGB each, sizes may differ.
        labels: one text per picture, or none.

    Returns:
        (h', w', 3) uint8 RGB.
    """
    height = max(len(image) for image in images)
    gap = np.full((height, max(2, height // 120), 3), 24, np.uint8)
    row = []
    for k, image in enumerate(images):
        width = round(image.shape[1] * height / len(image))
        if len(image) != height:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
        row += [draw_label(image, labels[k]) if labels else image, gap]
    return np.concatenate(row[:-1], axis=1)


def animation_png(frames: Iterable[np.ndarray], fps: float = 12.0) -> bytes:
    """Encode an animation small enough for TensorBoard: APNG, or a GIF where that exceeds 2 MB.

    At most 480 pixels wide and 30 frames (longer input is thinned evenly and plays at the same
    speed); a GIF is made narrower until it fits the 2 MB too.

    Args:
        frames: (T, h, w, 3) uint8 RGB, T at least 1.
        fps: frames per second of the input.
    """
    frames = list(frames)
    step = math.ceil(len(frames) / _ANIMATION_FRAMES)
    frames, duration = frames[::step], 1000 * step / fps
    images = [_shrink(frame, _ANIMATION_WIDTH) for frame in frames]
    if _png_bytes(images) <= _ANIMATION_BYTES:
        return _encode(images, "PNG", duration)
    data = _gif(images, duration)
    while len(data) > _ANIMATION_BYTES and images[0].width > 64:
        width = int(images[0].width * 0.95 * math.sqrt(_ANIMATION_BYTES / len(data)))
        images = [_shrink(frame, width) for frame in frames]
        data = _gif(images, duration)
    return data


def _shrink(frame: np.ndarray, width: int) -> Image.Image:
    if frame.shape[1] > width:
        size = (width, max(1, round(len(frame) * width / frame.shape[1])))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return Image.fromarray(np.ascontiguousarray(frame))


def _png_bytes(images: list[Image.Image]) -> int:
    """Predict the size of an APNG from a still and a change; encoding it all to see is slow."""
    middle = len(images) // 2
    still = len(_encode(images[middle : middle + 1], "PNG", 100))
    change = len(_encode(images[middle - 1 : middle + 1], "PNG", 100)) - still
    return still + (len(images) - 1) * change


def _gif(images: list[Image.Image], duration: float) -> bytes:
    # The octree is thirty times faster than Pillow's default and compresses better.
    paletted = [
        image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for image in images
    ]
    return _encode(paletted, "GIF", duration)


def _encode(images: list[Image.Image], kind: str, duration: float) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return buffer.getvalue()
