"""From a fitted field to trajectories: chunked, bounded memory, any query at any time.

Letters: N points, T times, S samples per ray.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from omni.coords import (
    denormalize,
    grid_queries,
    inside,
    normalize,
    pixel_centers,
    processing_size,
    rescale,
)
from omni.errors import OmniError
from omni.model import Field
from omni.tracks import Tracks

__all__ = ["FieldReader"]


class FieldReader:
    """Answers queries from a fitted field.

    Args:
        field: fitted, on its device.
        size: (h, w) processing size the field was fitted at.
        video_size: (H, W) of the original video.
        fps: of the processed frames.
        calibration: `floor` and `slope` of sigma, processing pixels (see `Trainer.calibrate`).
        chunk: rays evaluated at once.
    """

    def __init__(
        self,
        field: Field,
        size: tuple[int, int],
        video_size: tuple[int, int],
        fps: float,
        calibration: dict[str, float],
        chunk: int,
    ):
        self.field = field.eval()
        self.size, self.video_size, self.fps = size, video_size, fps
        self.calibration, self.chunk = calibration, chunk
        self.device = next(field.parameters()).device

    def tracks(
        self,
        query_points: np.ndarray,
        times: np.ndarray | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Tracks:
        """Trajectories of points, forward and backward from their query time.

        Args:
            query_points: (N, 3) t, y, x; raster pixels of the original video, t may be fractional.
            times: (T,) times in frames to answer at, any real values; None: every frame.
            progress: called with the number of points finished in each chunk.

        Raises:
            OmniError: a query outside the video's time range or frame.
        """
        points = self._checked(query_points)
        if times is None:
            times = np.arange(self.field.num_frames)
        times = np.asarray(times, dtype=np.float32)
        shape = (len(points), len(times))
        xy = np.empty((*shape, 2), np.float32)
        visibility, sigma = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for index in _same_time(points[:, 0], max(1, self.chunk // 4)):
            xy[index], visibility[index] = self._follow(points[index], times)
            sigma[index] = self._sigma(np.abs(times - points[index[0], 0]))
            progress(len(index))
        return Tracks(
            tracks=rescale(xy, self.size, self.video_size),
            visible=visibility > 0.5,
            visibility=visibility,
            sigma=sigma * self.video_size[0] / self.size[0],
            query_points=points,
            size=self.video_size,
            fps=self.fps,
        )

    def dense(self, frame: float, stride: int = 1, times: np.ndarray | None = None) -> Tracks:
        """Trajectories of every `stride`-th pixel of a frame, row by row of the strided grid."""
        return self.tracks(grid_queries(self.video_size, frame, stride), times)

    @torch.no_grad()
    def render(self, time: float, short_side: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Colour `(h', w', 3)` in [0, 1] and depth `(h', w')` of the field at one time in frames.

        `short_side` bounds the picture's size; 0 renders at the processing resolution.
        """
        height, width = processing_size(self.size, short_side)
        xy = normalize(torch.from_numpy(pixel_centers((height, width))), (height, width))
        xy = xy.reshape(-1, 2).to(self.device)
        moment = torch.tensor([float(time)], device=self.device)
        color, depth = [], []
        for part in xy.split(self.chunk):
            rays = self.field.cast(moment, part[None])
            color.append(rays.composite_color()[0].cpu())
            depth.append(rays.composite_depth()[0].cpu())
        color = torch.cat(color).view(height, width, 3).numpy()
        return color, torch.cat(depth).view(height, width).numpy()

    @torch.no_grad()
    def _follow(self, points: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions `(n, T, 2)` in processing pixels and visibility `(n, T)`; one query time."""
        xy = rescale(points[:, :0:-1], self.video_size, self.size)
        xy = normalize(torch.from_numpy(np.ascontiguousarray(xy)), self.size).to(self.device)
        rays = self.field.cast(torch.tensor([points[0, 0]], device=self.device), xy[None])
        positions, visibility = [], []
        for part in torch.from_numpy(times).to(self.device).split(max(1, self.chunk // len(xy))):
            count = len(part)
            shared = type(rays)(
                *(v.expand(count, *v.shape[1:]) for v in (rays.canonical, rays.depth)),
                *(v.expand(count, *v.shape[1:]) for v in (rays.weight, rays.color)),
                rays.step,
            )
            reached, _ = self.field.follow(shared, part)
            seen = self.field.seen_depth(part, reached[..., :2])
            margin = self.field.render.occlusion_margin
            chance = torch.sigmoid((seen + margin - reached[..., 2]) * (4 / margin))
            pixels = denormalize(reached[..., :2], self.size)
            chance = chance * inside(pixels, self.size)
            positions.append(pixels.transpose(0, 1).cpu().numpy())
            visibility.append(chance.T.cpu().numpy())
        return np.concatenate(positions, axis=1), np.concatenate(visibility, axis=1)

    def _sigma(self, gap: np.ndarray) -> np.ndarray:
        return self.calibration["floor"] + self.calibration["slope"] * np.sqrt(gap)

    def _checked(self, query_points: np.ndarray) -> np.ndarray:
        points = np.asarray(query_points, dtype=np.float32)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            raise OmniError(f"queries must be finite numbers (N, 3) t y x, got {points.shape}")
        late = (points[:, 0] < 0) | (points[:, 0] > self.field.num_frames - 1)
        outside = ~inside(points[:, :0:-1], self.video_size)
        for wrong, what in ((late, "time"), (outside, "frame")):
            if wrong.any():
                which = int(np.flatnonzero(wrong)[0])
                height, width = self.video_size
                raise OmniError(
                    f"query {which} {points[which].tolist()} (t, y, x) lies outside the {what}: "
                    f"the video has frames 0 to {self.field.num_frames - 1} of {width}x{height}"
                )
        return points


def _same_time(times: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Indices of queries that share a time, at most `limit` at once."""
    for time in np.unique(times):
        index = np.flatnonzero(times == time)
        for start in range(0, len(index), limit):
            yield index[start : start + limit]
