"""What a run shows in TensorBoard: curves while it trains, pictures, and animated tracks."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from omni.config import Config, to_yaml
from omni.field import Field, Trainer
from omni.maths import decode_flow, normalize, pixel_centers
from omni.store import Store
from omni.tracking import Reader, Tracks
from omni.views.board import Board, yaml_markdown
from omni.views.overlay import draw_tracks
from omni.views.pictures import depth_to_image, error_to_image, flow_to_image, side_by_side

__all__ = ["Summaries", "summary_table"]

SIDE = 128
"""Short side of rendered pictures, pixels: rendering one takes as long as about ten steps."""

ANIMATED_TRACKS = 400

DEPTH_EXTENT = 0.5
"""One depth unit in short sides of the frame, for the 3D view only: depth has no metric."""


class Summaries:
    """Writes a fit's events and a run's results; a context manager.

    Args:
        folder: the run's `tensorboard` folder.
        config: settings of the run, shown as text.
        step: step the fit continues from; curves already written beyond it are superseded.
    """

    def __init__(self, folder: Path, config: Config, step: int | None = None):
        self.board = Board(folder, purge_step=step)
        self.config = config

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *_: object) -> None:
        self.board.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Curves of one step."""
        self.board.scalars(values, step)

    def images(self, trainer: Trainer) -> None:
        """Reconstruction, depth and flow of the middle frame beside what was measured."""
        store, field, step = trainer.store, trainer.field, trainer.step
        frame = store.num_frames // 2
        color, depth = Reader(store, field, self.config.output.chunk).render(frame, SIDE)
        size = color.shape[:2]
        observed = _resized(store.frames[frame], size)
        rendered = (255 * color).round().astype(np.uint8)
        error = np.abs(observed.astype(np.float32) - rendered).mean(-1)
        pictures = [observed, rendered, error_to_image(error, 64.0)]
        self.board.image(
            "field/reconstruction", side_by_side(pictures, ["frame", "rendered", "error"]), step
        )
        self.board.image("field/depth", depth_to_image(depth), step)
        self.board.image("field/flow", _flow_picture(field, store, frame, size), step)
        pixels = pixel_centers(size) * (store.size[0] / size[0])
        vertices = np.dstack([pixels, depth * DEPTH_EXTENT * min(store.size)])
        self.board.points("field/surface", vertices.reshape(-1, 3), rendered.reshape(-1, 3), step)

    def results(self, step: int, store: Store, tracks: Tracks, report: dict[str, Any]) -> None:
        """Animated tracks, settings and summary of a finished run."""
        every = -(-len(tracks.tracks) // ANIMATED_TRACKS)
        few = tracks.subset(slice(None, None, every))
        drawn = list(draw_tracks(store.frames, few))
        self.board.animation("tracks/animation", drawn, step, store.fps)
        self.board.text("run/config", yaml_markdown(to_yaml(self.config)), step)
        self.board.text("run/summary", summary_table(report), step)


def summary_table(report: dict[str, Any]) -> str:
    """`report.json` as a Markdown table: one row per stage, then the held-out errors."""
    lines = ["| stage | seconds | peak memory (MB) |", "|---|---|---|"]
    for stage, record in report.get("stages", {}).items():
        lines.append(f"| {stage} | {record['seconds']:.1f} | {record['peak_memory_mb']} |")
    history = report.get("stages", {}).get("fit", {}).get("held_out", [])
    if history:
        last = history[-1]
        lines.append("")
        lines.append(
            f"Held-out correspondences: median {last['median']:.2f} px, "
            f"{100 * last['within_1px']:.0f} % within 1 px (processing resolution)."
        )
    return "\n".join(lines)


@torch.no_grad()
def _flow_picture(field: Field, store: Store, frame: int, size: tuple[int, int]) -> np.ndarray:
    """Measured beside rendered flow of the longest stored link starting at `frame`."""
    pairs = store.pairs
    links = np.flatnonzero(pairs[:, 0] == frame)
    if len(links) == 0:
        links = np.arange(len(pairs))
    k = links[np.abs(pairs[links, 1] - pairs[links, 0]).argmax()]
    source, target = pairs[k]
    device = next(field.parameters()).device
    xy = normalize(torch.from_numpy(pixel_centers(size)), size).reshape(1, -1, 2).to(device)
    rays = field.cast(torch.tensor([float(source)], device=device), xy)
    reached, _ = field.follow(rays, torch.tensor([float(target)], device=device))
    height, width = store.size
    pixels = np.array([width, height], np.float32) / 2
    rendered = ((reached[..., :2] - xy).view(*size, 2).cpu().numpy()) * pixels
    measured = _resized(decode_flow(store.flow[k]), size)
    limit = float(np.percentile(np.linalg.norm(measured, axis=-1), 99)) + 1e-3
    pictures = [flow_to_image(measured, limit), flow_to_image(rendered, limit)]
    return side_by_side(pictures, [f"measured {source} to {target}", "field"])


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(np.asarray(image), size[::-1], interpolation=cv2.INTER_AREA)
