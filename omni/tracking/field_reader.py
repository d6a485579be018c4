"""The fitted field alone: where points are at other times, and pictures of it.

Letters: N points, T times, M of them.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from omni.field import Field, Rays
from omni.maths import (
    REFERENCE_SIDE,
    denormalize,
    inside,
    normalize,
    pixel_centers,
    processing_size,
    rescale,
)
from omni.store import Store
from omni.system import out_of_memory
from omni.tracking.fusion import FieldEstimate

__all__ = ["FieldReader"]

log = logging.getLogger(__name__)

SMALLEST_CHUNK = 16

SAME_POINT = 6.0
"""Pixels at a short side of 256 from the query, to which the surface seen where the field takes a
point must lead back: else another surface hides the point there."""


class FieldReader:
    """Positions and pictures of a field.

    Args:
        store: finished preprocessing, for the sizes of the video.
        field: fitted, on its device; without one neither `follow` nor `render` can be called.
        chunk: points or rays processed at once.
    """

    def __init__(self, store: Store, field: Field | None, chunk: int):
        self.field, self.chunk = field, chunk
        self.size, self.video_size, self.fps = store.size, store.video_size, store.fps
        self.num_frames, self.frames = store.num_frames, store.frames
        self.device = torch.device("cpu") if field is None else next(field.parameters()).device

    @torch.no_grad()
    def follow(self, query_points: np.ndarray, times: np.ndarray) -> FieldEstimate:
        """The field's estimate alone.

        Args:
            query_points: (N, 3) t, y, x in original pixels.
            times: (T,) times in frames.
        """
        shape = (len(query_points), len(times))
        estimate = FieldEstimate(np.empty((*shape, 2), np.float32), np.empty(shape, np.float32))
        for index in _same_time(query_points[:, 0], max(1, self.chunk // 4)):
            xy, visibility = self._follow(query_points[index], times)
            estimate.xy[index], estimate.visibility[index] = xy, visibility
        return estimate

    @torch.no_grad()
    def render(self, time: float, short_side: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Colour `(h', w', 3)` in [0, 1] and depth `(h', w')` of the field at one time in frames.

        Args:
            time: in frames, any real value.
            short_side: bound of the image's size; 0 renders at the processing resolution.
        """
        assert self.field is not None
        field = self.field
        height, width = processing_size(self.size, short_side)
        xy = normalize(torch.from_numpy(pixel_centers((height, width))), (height, width))
        xy = xy.reshape(-1, 2).to(self.device)
        moment = torch.tensor([float(time)], device=self.device)
        colors: list[torch.Tensor] = []
        depths: list[torch.Tensor] = []

        def render_rays(rows: slice) -> None:
            rays = field.cast(moment, xy[None, rows])
            color, depth = rays.composite_color()[0].cpu(), rays.composite_depth()[0].cpu()
            colors.append(color)
            depths.append(depth)

        self._in_chunks(len(xy), render_rays)
        color = torch.cat(colors).view(height, width, 3).numpy()
        return color, torch.cat(depths).view(height, width).numpy()

    @torch.no_grad()
    def _follow(self, points: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions `(n, T, 2)` in processing pixels and visibility `(n, T)`; one query time."""
        assert self.field is not None
        query = np.ascontiguousarray(rescale(points[:, :0:-1], self.video_size, self.size))
        start = torch.from_numpy(query).to(self.device)
        moment = torch.tensor([float(points[0, 0])], device=self.device)
        rays = self.field.cast(moment, normalize(start, self.size)[None])
        moments = torch.as_tensor(times, dtype=torch.float32, device=self.device)
        near = SAME_POINT * min(self.size) / REFERENCE_SIDE
        positions, visibility = [], []
        for part in moments.split(max(1, self.chunk // len(start))):
            arrived, _ = self.field.follow(_repeated(rays, len(part)), part)
            seen = self.field.cast(part, arrived[..., :2])
            back, _ = self.field.follow(seen, moment.expand_as(part))
            away = (denormalize(back[..., :2], self.size) - start).norm(dim=-1)
            pixels = denormalize(arrived[..., :2], self.size)
            probability = torch.sigmoid(4 * (1 - away / near)) * inside(pixels, self.size)
            positions.append(pixels.transpose(0, 1).cpu().numpy())
            visibility.append(probability.T.cpu().numpy())
        return np.concatenate(positions, axis=1), np.concatenate(visibility, axis=1)

    def _in_chunks(self, total: int, work: Callable[[slice], None]) -> None:
        """Call `work(rows)` for all rows; when out of memory, halve the chunk and continue."""
        start = 0
        while start < total:
            try:
                work(slice(start, min(start + self.chunk, total)))
                start += self.chunk
                continue
            except Exception as error:
                if not out_of_memory(error) or self.chunk <= SMALLEST_CHUNK:
                    raise
            self.chunk //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("out of memory: going on in chunks of %d points", self.chunk)


def _repeated(rays: Rays, count: int) -> Rays:
    """One group of rays as `count` groups, which share memory."""
    arrays = {name: getattr(rays, name) for name in ("canonical", "depth", "weight", "color")}
    repeated = {name: value.expand(count, *value.shape[1:]) for name, value in arrays.items()}
    return replace(rays, **repeated)


def _same_time(times: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Indices of queries that share a time, at most `limit` at once."""
    for time in np.unique(times):
        index = np.flatnonzero(times == time)
        for start in range(0, len(index), limit):
            yield index[start : start + limit]
