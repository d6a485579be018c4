"""Videos of what the field renders."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from omni.tracking import Reader
from omni.views.pictures import depth_to_image

__all__ = ["render_videos"]


def render_videos(reader: Reader, folder: Path, fps: float, side: int, most_frames: int) -> None:
    """Write `color.mp4` and `depth.mp4` into a folder.

    Args:
        reader: of a fitted run.
        folder: where to write.
        fps: frames per second of the whole video.
        side: short side of the pictures, pixels.
        most_frames: frames rendered at most, evenly spaced.

    Raises:
        OmniError: a file cannot be written.
    """
    # Here, so that TensorBoard can be written on a machine without what writes videos.
    from omni.video import write_video

    step = -(-reader.num_frames // most_frames)
    colors, depths = [], []
    for time in tqdm(range(0, reader.num_frames, step), desc="render", disable=None):
        color, depth = reader.render(time, side)
        colors.append((color * 255).round().astype(np.uint8))
        depths.append(depth)
    write_video(folder / "color.mp4", iter(colors), fps / step)
    # As one tall picture, so that all frames share one colour scale.
    painted = depth_to_image(np.concatenate(depths)).reshape(len(depths), *colors[0].shape)
    write_video(folder / "depth.mp4", iter(painted), fps / step)
