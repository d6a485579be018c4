"""The video's global motion: found in adjacent flows, applied and undone.

Raster pixels of the processing resolution. Letters: N points, T frames, M times.
"""

import numpy as np
import torch

from omni.coords import denormalize, normalize, pixel_centers
from omni.splines import catmull_rom_weights, table_at
from omni.store import Store, decode_flow, unpack_evidence

__all__ = ["REFERENCE_SIDE", "Camera", "global_motion"]

REFERENCE_SIDE = 256
"""Motions are judged as if the short side had this many pixels."""


class Camera:
    """Per-frame affine maps from each frame to one stabilised plane.

    Args:
        maps: (T, 2, 3) in normalised coordinates, see `global_motion`.
        size: (h, w) processing size.
    """

    def __init__(self, maps: np.ndarray, size: tuple[int, int]):
        self.maps, self.size = maps.astype(np.float64), size

    def stabilize(self, xy: np.ndarray) -> np.ndarray:
        """Positions `(N, T, 2)` in every frame, on the stabilised plane."""
        return self._mapped(xy, self.maps)

    def restore(self, xy: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Positions `(N, M, 2)` on the stabilised plane, in the frames of `(M,)` real times."""
        moments = torch.as_tensor(np.asarray(times, np.float64))
        weights = catmull_rom_weights(moments, len(self.maps))
        maps = table_at(torch.from_numpy(self.maps), *weights).numpy()
        square = np.concatenate([maps, np.tile([[[0.0, 0.0, 1.0]]], (len(maps), 1, 1))], axis=1)
        return self._mapped(xy, np.linalg.inv(square)[:, :2]).astype(np.float32)

    def _mapped(self, xy: np.ndarray, maps: np.ndarray) -> np.ndarray:
        place = normalize(np.asarray(xy, np.float64), self.size)
        moved = np.einsum("tij,ntj->nti", maps[:, :, :2], place) + maps[:, :, 2]
        return denormalize(moved, self.size)


def global_motion(store: Store, threshold: float) -> np.ndarray:
    """Affine maps `(T, 2, 3)`, normalised coordinates, from each frame to the middle frame.

    Adjacent flows are fitted by iteratively reweighted least squares, so that the majority (the
    background) decides, and composed outwards from the middle frame.

    Args:
        store: finished preprocessing.
        threshold: forward-backward error in pixels up to which a flow counts.
    """
    middle = store.num_frames // 2
    links = {tuple(pair): k for k, pair in enumerate(store.pairs.tolist())}
    maps = np.tile(np.eye(3), (store.num_frames, 1, 1))
    for frame in [*range(middle - 1, -1, -1), *range(middle + 1, store.num_frames)]:
        inner = frame + 1 if frame < middle else frame - 1
        k = links.get((frame, inner))
        step = np.eye(3) if k is None else _affine(store, k, threshold)
        maps[frame] = maps[inner] @ step
    return maps[:, :2].astype(np.float32)


def _affine(store: Store, k: int, threshold: float) -> np.ndarray:
    """Robust `(3, 3)` affine map explaining most of flow `k`; identity where it cannot be had."""
    size = store.size
    stride = max(1, int(np.sqrt(size[0] * size[1] / 2000)))
    evidence = unpack_evidence(store.evidence[k][::stride, ::stride])
    good = evidence.valid & (evidence.error <= threshold)
    if good.sum() < 20:
        return np.eye(3)
    flow = decode_flow(store.flow[k][::stride, ::stride])
    points = pixel_centers(size)[::stride, ::stride]
    source = normalize(points, size)[good].astype(np.float64)
    target = normalize(points + flow, size)[good].astype(np.float64)
    design = np.concatenate([source, np.ones((len(source), 1))], axis=1)
    pixels = np.array([size[1], size[0]]) / 2 * (REFERENCE_SIDE / min(size))
    weight = np.ones(len(source))
    for _ in range(10):
        root = np.sqrt(weight)[:, None]
        solution = np.linalg.lstsq(root * design, root * target, rcond=None)[0]
        residual = (((design @ solution - target) * pixels) ** 2).sum(1)
        weight = 1 / (1 + residual / 0.25)
    matrix = np.eye(3)
    matrix[:2] = solution.T
    plausible = 0.5 < np.linalg.det(matrix) < 2
    return matrix if plausible and np.isfinite(matrix).all() else np.eye(3)
