"""The video's global motion applied and undone: frames to one stabilised plane and back.

Raster pixels of the processing resolution. Letters: N points, T frames, M times.
"""

import numpy as np
import torch

from omni.maths.coords import denormalize, normalize
from omni.maths.splines import catmull_rom_weights, table_at

__all__ = ["REFERENCE_SIDE", "Camera"]

REFERENCE_SIDE = 256
"""Motion residuals are measured at a short side of this many pixels."""


class Camera:
    """Per-frame affine maps from each frame to one stabilised plane.

    Args:
        maps: (T, 2, 3) in normalised coordinates, see `omni.field.global_motion`.
        size: (h, w) processing size.
    """

    def __init__(self, maps: np.ndarray, size: tuple[int, int]):
        self.maps, self.size = maps.astype(np.float64), size

    def stabilize(self, xy: np.ndarray, start: int = 0) -> np.ndarray:
        """Positions `(N, M, 2)` in consecutive frames from `start`, on the stabilised plane."""
        return self._mapped(xy, self.maps[start : start + xy.shape[1]])

    def restore(self, xy: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Positions `(N, M, 2)` on the stabilised plane, in the frames of `(M,)` real times."""
        moments = torch.as_tensor(np.asarray(times, np.float64))
        weights = catmull_rom_weights(moments, len(self.maps))
        maps = table_at(torch.from_numpy(self.maps), *weights).numpy()
        square = np.concatenate([maps, np.tile([[[0.0, 0.0, 1.0]]], (len(maps), 1, 1))], axis=1)
        return self._mapped(xy, np.linalg.inv(square)[:, :2]).astype(np.float32)

    def offset_maps(self, frame: int) -> np.ndarray:
        """Maps `(T, 2, 2)` of an offset between two points of `frame` to every frame, pixels.

        The offset is constant in the stabilised plane.
        """
        pixels = np.array([self.size[1], self.size[0]]) / 2
        linear = self.maps[:, :, :2]
        return pixels[:, None] * (np.linalg.inv(linear) @ linear[frame]) / pixels

    def _mapped(self, xy: np.ndarray, maps: np.ndarray) -> np.ndarray:
        place = normalize(np.asarray(xy, np.float64), self.size)
        moved = np.einsum("tij,ntj->nti", maps[:, :, :2], place) + maps[:, :, 2]
        return denormalize(moved, self.size)
