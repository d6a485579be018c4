"""Object masks of a video: which file belongs to which frame, and what its values mean."""

import re
from pathlib import Path

import numpy as np

from omni.errors import OmniError
from omni.system import require_memory
from omni.video.images import list_images, read_mask
from omni.video.source import VideoSource, check_size

__all__ = ["load_masks"]

_MOST_LABELS = 64


def load_masks(path: Path | str, source: VideoSource) -> dict[int, np.ndarray]:
    """Object masks of some or all frames.

    A folder's masks belong to the frame of the same file name where `source` is a folder, else to
    the frame of that number (complete sequences may count from 1), else to frames in order. A
    single file belongs to the frame of its name or number, else to the first selected frame.
    Indexed images are labels, 255 unknown; grey images holding only 0 and 255 become 0 and 1.

    Args:
        path: folder of masks or one mask.
        source: the video they belong to.

    Returns:
        selected index to (H, W) uint8 labels, 0 background, at the size of the video.

    Raises:
        OmniError: no such path, unreadable, another size than the video, or no frame fits.
    """
    path = Path(path)
    if path.is_dir():
        files = list_images(path)
        numbers = _match_folder([file.stem for file in files], source)
    elif path.is_file():
        files, numbers = [path], [_match_single(path.stem, source)]
    else:
        raise OmniError(f"{path} does not exist: give a mask or a folder of masks")
    chosen = [pair for pair in zip(files, numbers, strict=True) if pair[1] in source.frames]
    height, width = source.size
    needed = 2 * len(chosen) * height * width  # as read, and as labels
    require_memory(needed, f"reading the masks in {path}", "give masks of fewer frames")
    raw = {}
    for file, number in chosen:
        index = source.frames.index(number)
        raw[index] = read_mask(file)
        check_size(f"mask {file}", raw[index][0].shape, source.size)
    if not raw:
        raise OmniError(
            f"no mask in {path} belongs to a selected frame of {source.path}: name each mask like "
            "its frame (or by its frame number)"
        )
    return _as_labels(raw)


def _match_folder(stems: list[str], source: VideoSource) -> list[int]:
    """Frame number of every mask of a folder, -1 where there is none."""
    if source.names:
        return [_number_of_name(stem, source) for stem in stems]
    trailing = [_trailing_number(stem) for stem in stems]
    numbers, count = [number for number in trailing if number is not None], len(stems)
    from_one = trailing == list(range(1, count + 1)) and count > source.frames[-1]
    return list(range(count)) if len(numbers) < count or from_one else numbers


def _match_single(stem: str, source: VideoSource) -> int:
    number = _number_of_name(stem, source)
    if not source.names and stem.isdecimal():
        number = int(stem)
    return number if number in source.frames else source.frames[0]


def _number_of_name(stem: str, source: VideoSource) -> int:
    stems = [Path(name).stem for name in source.names]
    return source.frames[stems.index(stem)] if stem in stems else -1


def _trailing_number(stem: str) -> int | None:
    digits = re.search(r"\d+$", stem, re.ASCII)
    return int(digits.group()) if digits else None


def _as_labels(masks: dict[int, tuple[np.ndarray, bool]]) -> dict[int, np.ndarray]:
    """Turn grey masks into labels; decided over all of them, since one may lack the object.

    Grey levels are labels unless they are only 0 and 255, or so many (antialiasing, jpeg) that
    they can only be a binary mask with soft edges.
    """
    levels = {int(v) for mask, indexed in masks.values() if not indexed for v in np.unique(mask)}
    binary = levels <= {0, 255} or len(levels) > _MOST_LABELS
    return {
        index: (mask > 127).astype(np.uint8) if binary and not indexed else mask
        for index, (mask, indexed) in masks.items()
    }
