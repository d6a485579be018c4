"""Where a fit starts: global motion and a first depth order, from the flows alone.

Everything is fitted to adjacent flows. Letters: T frames, h x w processing size.
"""

import cv2
import numpy as np

from omni.maths import REFERENCE_SIDE, decode_flow, normalize, pixel_centers, unpack_evidence
from omni.store import Store

__all__ = ["global_motion", "surface_depth"]


def surface_depth(store: Store, motion: np.ndarray, cells: int) -> np.ndarray:
    """First surface maps `(T, cells, cells)`: surfaces moving against the background lie nearer.

    depth = 1.3 - 0.6 tanh(m / 2), m the mean residual motion in pixels per frame (at a short side
    of REFERENCE_SIDE).

    Args:
        store: finished preprocessing.
        motion: `(T, 2, 3)` maps of `global_motion`.
        cells: side of a surface map.
    """
    size = store.size
    scale = REFERENCE_SIDE / min(size)
    residual = np.zeros((store.num_frames, cells, cells), np.float32)
    count = np.zeros((store.num_frames, 1, 1), np.float32)
    xy = normalize(pixel_centers(size), size)
    maps = np.concatenate([motion, np.tile([[[0, 0, 1]]], (len(motion), 1, 1))], axis=1)
    for k, (source, target) in enumerate(store.pairs.tolist()):
        if abs(source - target) != 1:
            continue
        step = np.linalg.inv(maps[target]) @ maps[source]
        moved = xy @ step[:2, :2].T + step[:2, 2]
        background = (moved - xy) * np.array([size[1] / 2, size[0] / 2])
        distance = np.linalg.norm(decode_flow(store.flow[k]) - background, axis=-1) * scale
        residual[source] += cv2.resize(
            distance.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA
        )
        count[source] += 1
    return 1.3 - 0.6 * np.tanh(residual / np.maximum(count, 1) / 2)


def global_motion(store: Store, threshold: float) -> np.ndarray:
    """Affine maps `(T, 2, 3)`, normalised coordinates, from each frame to the middle frame.

    Adjacent flows are fitted by iteratively reweighted least squares, so that the dominant
    motion (the background's) is found, and composed outwards from the middle frame.

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
    """Robust `(3, 3)` affine map explaining most of flow `k`; identity where none is found."""
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
