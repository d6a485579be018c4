"""Render a synthetic clip with exact ground truth: OUT/SCENE.mp4 and OUT/SCENE_truth.npz.

python scripts/make_demo.py runs/demo
omni optimize runs/demo/demo.mp4 -o runs/demo/run
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from omni.errors import OmniError
from omni.maths import grid_queries
from omni.synthetic import SCENES, SyntheticClip, make_clip
from omni.video import write_video

FPS = 24.0
STRIDE = 16
"""pixels between the truth's query points"""


def frame_size(text: str) -> tuple[int, int]:
    """Read `HEIGHTxWIDTH`."""
    height, width = (int(part) for part in text.split("x"))
    if min(height, width) < 16:
        raise ValueError("at least 16x16 pixels")
    return height, width


def truth_queries(clip: SyntheticClip) -> np.ndarray:
    """(N, 3) t, y, x: a grid on the first, the last and two frames between."""
    last = len(clip.video) - 1
    frames = sorted({0, last // 3, 2 * last // 3, last})
    return np.concatenate([grid_queries(clip.size, frame, STRIDE) for frame in frames])


def main() -> None:
    """Parse the command line, render, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--scene", choices=list(SCENES), default="demo")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=frame_size, default="192x256", help="HEIGHTxWIDTH")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    clip = make_clip(arguments.scene, arguments.frames, arguments.size, arguments.seed)
    queries = truth_queries(clip)
    tracks, visible = clip.track(queries)
    arguments.out.mkdir(parents=True, exist_ok=True)
    video = arguments.out / f"{clip.name}.mp4"
    write_video(video, clip.video, FPS, crf=8)
    np.savez_compressed(
        arguments.out / f"{clip.name}_truth.npz",
        tracks=tracks.astype(np.float32),
        visible=visible,
        query_points=queries,
        size=np.array(clip.size),
    )
    print(f"{video}: {len(clip.video)} frames, {len(queries)} true tracks beside it")


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"make_demo: {error}")
