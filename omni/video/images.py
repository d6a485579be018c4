"""Image files as they come: folders in natural order, any depth, palette, orientation or mask.

Arrays are uint8; sizes are (height, width) as displayed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from omni.errors import OmniError
from omni.system import require_memory

__all__ = ["image_size", "list_images", "read_image", "read_mask"]

_SUFFIXES = {".jpg", ".jpeg", ".png"}
_ORIENTATION_TAG = 0x0112
_FORMATS = ("JPEG", "PNG")
"""Pillow goes by content, whatever the name, and passes some formats to other programs."""


def list_images(path: Path) -> list[Path]:
    """List the jpg and png files of a folder in natural order (2 before 10).

    Other files and hidden ones (macOS `._x.jpg`) do not count.

    Raises:
        OmniError: there are none, or the folder cannot be read.
    """
    try:
        # Only regular files: opening a pipe would wait forever.
        files = [
            file
            for file in path.iterdir()
            if file.suffix.lower() in _SUFFIXES and file.name[0] != "." and file.is_file()
        ]
    except OSError as error:
        raise OmniError(f"folder {path} cannot be read ({error.strerror})") from None
    if not files:
        raise OmniError(f"folder {path} holds no jpg or png images: give a folder of frames")
    return sorted(files, key=lambda file: (_natural(file.stem), file.name))


def _natural(text: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", text, re.ASCII)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts]


@contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            require_memory(12 * width * height, f"image {path}", "use a smaller one")
            yield image
    except OmniError:
        raise
    except Exception as error:  # a damaged or hostile image can fail anywhere in its decoder
        raise OmniError(f"image {path} cannot be read ({error}): replace or remove it") from None


def image_size(path: Path) -> tuple[int, int]:
    """Size (H, W) as displayed (EXIF orientation applied), from the header alone.

    Raises:
        OmniError: not an image.
    """
    with _image(path) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_image(path: Path) -> np.ndarray:
    """Decode to `(H, W, 3)` uint8 RGB; 16-bit values keep their upper byte, alpha is dropped.

    Raises:
        OmniError: the file cannot be decoded.
    """
    with _image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


def read_mask(path: Path) -> tuple[np.ndarray, bool]:
    """Decode a mask to `(H, W)` uint8 values, and whether they are palette indices (labels).

    Raises:
        OmniError: the file cannot be decoded or is in colour.
    """
    with _image(path) as image:
        if image.mode == "P":
            return np.array(image), True
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            values = values >> 8 if values.max() > 255 else values
            return values.clip(0, 255).astype(np.uint8), False
        values = np.array(image.convert("RGB"))
    if (values != values[..., :1]).any():
        raise OmniError(f"mask {path} is a colour image: save it as an indexed or grey image")
    return values[..., 0], False
