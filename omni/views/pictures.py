"""Pictures of what was measured and fitted: flow, depth, error, labels, small animations.

Pure functions from arrays to uint8 RGB arrays (or encoded bytes); nothing is written to files.
"""

import io
import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omni.views.overlay import draw_tracks, track_colors

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

_UNKNOWN = (128, 128, 128)
_ANIMATION_WIDTH, _ANIMATION_FRAMES, _ANIMATION_BYTES = 480, 30, 2_000_000


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
    middle = (len(images) - 1) // 2
    still = len(_encode(images[middle : middle + 1], "PNG", 100))
    change = len(_encode(images[middle : middle + 2], "PNG", 100)) - still
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
