"""Train the network that selects among the few candidates of a pixel (`omni.tracking.dense`).

    python scripts/train_pixels.py --work runs/pixels

Renders, films, preprocesses and fits clips with exact ground truth, answers the anchors of one
frame of each, and writes `omni/tracking/dense/network.safetensors`. What is already in the folder
is used again, so that an interrupted run continues. The evaluation clips are not used.
"""

import argparse
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm
from train_selection import Clip, train

from omni import run as runs
from omni.config import Config, load_config
from omni.maths import pixel_centers
from omni.synthetic import filmed_frames, make_clip
from omni.system import write_atomic

SIZE, FRAMES = (192, 256), 24
NAMED = ("desk", "bars", "shake", "demo", "cloth", "blocks")
STEPS = 300
"""of a fit: fused tracks do not depend on its length"""
ANYWHERE, NEAR_BORDER = 700, 500
"""queries of a frame, and those within 3 px of a segment's border"""

OUT = Path(__file__).resolve().parent.parent / "omni" / "tracking" / "dense" / "network.safetensors"


def main() -> None:
    """Render, fit, gather candidates, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/pixels"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 212)))
    parser.add_argument("--steps", type=int, default=20000, help="of the network's training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    options = parser.parse_args()
    settings = [f"optim.steps={STEPS}", "data.resolution=0", *options.set]
    config = load_config("cpu", settings)
    names = [(scene, seed) for seed in options.seeds for scene in ("mixed", "walk")]
    names += [(scene, 201) for scene in NAMED]
    clips = []
    for scene, seed in tqdm(names, desc="clips"):
        folder = options.work / f"{scene}-{seed}"
        prepare(folder, scene, seed, config)
        clips.append(gather(folder, (0, FRAMES // 2)[seed % 2]))
    network = train(clips, options.steps)
    write_atomic(options.out, save(network.state_dict()))


def prepare(folder: Path, scene: str, seed: int, config: Config) -> None:
    """A filmed clip, the ground truth of pixels of two of its frames, its flows and its fit."""
    truth, images = folder / "dense.npz", folder / "frames"
    if not truth.is_file():
        images.mkdir(parents=True, exist_ok=True)
        clip = make_clip(scene, FRAMES, SIZE, seed)
        for t, image in enumerate(filmed_frames(clip.video, seed)):
            iio.imwrite(images / f"{t:04d}.png", image)
        queries = np.concatenate(
            [pixels(clip.segmentation[t], t, seed) for t in (0, FRAMES // 2)]
        ).astype(np.float32)
        tracks, visible = clip.track(queries)
        np.savez(truth, queries=queries, tracks=tracks.astype(np.float32), visible=visible)
    runs.preprocess_video(images, folder / "run", config)
    runs.fit(folder / "run", config)


def pixels(segments: np.ndarray, frame: int, seed: int) -> np.ndarray:
    """Queries (N, 3) t y x: random pixels, and random ones near the borders of segments (h, w)."""
    random = np.random.default_rng((seed, frame))
    border = np.zeros(segments.shape, bool)
    for shift in ((0, 3), (3, 0), (0, -3), (-3, 0)):
        border |= np.roll(segments, shift, (0, 1)) != segments
    near = np.flatnonzero(border)
    chosen = np.concatenate(
        [
            random.choice(segments.size, ANYWHERE, replace=False),
            random.choice(near, min(NEAR_BORDER, len(near)), replace=False),
        ]
    )
    xy = pixel_centers(segments.shape).reshape(-1, 2)[chosen]
    return np.column_stack([np.full(len(xy), frame), xy[:, ::-1]])


def gather(folder: Path, frame: int) -> Clip:
    """Candidates of the pixels of one frame and their errors."""
    with np.load(folder / "dense.npz", allow_pickle=False) as data:
        rows = data["queries"][:, 0] == frame
        queries, truth, visible = (data[name][rows] for name in ("queries", "tracks", "visible"))
    reader = runs.load(folder / "run", "cpu").dense_reader(frame)
    candidates, values = reader.candidates_of_pixels(queries[:, :0:-1])
    xy, valid = candidates.xy, candidates.valid
    # Behind the camera a point has no position; it is occluded, so any value will do.
    target = np.where(np.isfinite(truth), truth, xy[0])
    return Clip(
        values=values.half(),
        valid=torch.from_numpy(valid.T.copy()),
        error=torch.from_numpy((xy - target).transpose(1, 2, 0, 3)).float(),
        visible=torch.from_numpy(visible),
        queried=torch.arange(truth.shape[1]).expand(len(truth), -1) == frame,
    )


if __name__ == "__main__":
    main()
