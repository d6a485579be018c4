"""Stored flows as links between frames: follow points from one frame to another.

Raster pixels of the processing resolution. The forward-backward error of a link is computed at the
point itself, which is more exact than a look-up in a stored error map. Letters: n points.
"""

import numpy as np

from omni.maths import decode_flow, unpack_evidence
from omni.store import UNKNOWN, Store

__all__ = ["Links", "sample_flow"]

STENCIL = 1.5
"""Half width in pixels over which a flow's Jacobian is measured: wider than its rounding."""

_STENCIL = np.float32(STENCIL) * np.array([(1, 0), (-1, 0), (0, 1), (0, -1)], np.float32)


class Links:
    """The flows of a store by frame pair.

    Attributes:
        size: (h, w) processing size.
        num_frames: T.
        gaps: stored distances between frames, ascending.
        release: frees the memory of what was read (see `Store.release`).
    """

    def __init__(self, store: Store):
        self._flow, self.release = store.flow, store.release
        self._index = {tuple(pair): k for k, pair in enumerate(store.pairs.tolist())}
        self.size, self.num_frames = store.size, store.num_frames
        self.gaps = sorted({abs(target - source) for source, target in self._index})
        self._evidence, self._masks = store.evidence, store.masks
        self._sigma = {int(gap): line for gap, line in store.meta("evidence")["sigma"].items()}

    def stored(self, source: int, target: int) -> bool:
        """Whether the store has the flow and its reverse, for the forward-backward error."""
        return (source, target) in self._index and (target, source) in self._index

    def fields(self, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Forward and backward flow of a stored pair, each as `sample_flow` takes it."""
        forward, backward = self._index[source, target], self._index[target, source]
        return self._flow[forward], self._flow[backward]

    def follow(self, source: int, target: int, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in frame `target` of points `(n, 2)` of frame `source`.

        Returns:
            positions `(n, 2)` and forward-backward errors `(n,)` in pixels.
        """
        forward, backward = self.fields(source, target)
        motion = sample_flow(forward, xy)
        arrived = xy + motion
        return arrived, np.linalg.norm(motion + sample_flow(backward, arrived), axis=-1)

    def stretch(self, source: int, target: int, xy: np.ndarray) -> np.ndarray:
        """Rms factor `(n,)` by which the flow's Jacobian J scales an error at points `(n, 2)`.

        `|J| / sqrt(2)` (Frobenius) keeps the trace of `J S J^T` for an isotropic covariance S: the
        scalar approximation of its propagation. 1 for rotations, high at motion borders.
        """
        forward, _ = self.fields(source, target)
        ends = np.concatenate([xy + offset for offset in _STENCIL])
        right, left, below, above = sample_flow(forward, ends).reshape(4, -1, 2)
        square = np.zeros(len(xy), np.float32)
        for axis, change in enumerate((right - left, below - above)):
            column = change / np.float32(2 * STENCIL)
            column[:, axis] += 1
            square += (column**2).sum(-1)
        return np.sqrt(square / 2)

    def occluded(self, source: int, target: int, xy: np.ndarray) -> np.ndarray:
        """`(n,)` bool: the double cycle detects that points are occluded in frame `target`."""
        return unpack_evidence(_nearest(self._evidence[self._index[source, target]], xy)).occluded

    def sigma(self, gap: int, error: np.ndarray) -> np.ndarray:
        """Standard deviation in pixels of a link, by its gap and its forward-backward error."""
        floor, slope = self._sigma[gap]
        return floor + slope * error

    def labels(self, frame: int, xy: np.ndarray) -> np.ndarray:
        """Mask labels `(n,)` uint8 at points of a frame; UNKNOWN everywhere without masks."""
        if self._masks is None:
            return np.full(len(xy), UNKNOWN, np.uint8)
        return _nearest(self._masks[frame], xy)


def _nearest(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Values `(n,)` of the pixels of an `(h, w)` image in which points lie, or nearest them."""
    height, width = image.shape
    column, row = np.clip(xy, 0, (width - 1, height - 1)).astype(np.int64).T
    return image[row, column]


def sample_flow(flow: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Bilinear flow at points, reading the 4 neighbours alone, so that memory maps stay on disk.

    Args:
        flow: (h, w, 2) int16 (see `decode_flow`) or float32 pixels.
        xy: (N, 2) raster pixels; beyond the outermost pixel centres the border value holds.

    Returns:
        (N, 2) float32 pixels.
    """
    height, width = flow.shape[:2]
    last = np.array([width - 1, height - 1], np.float32)
    position = np.clip(xy - np.float32(0.5), 0, last)
    corner = np.minimum(position.astype(np.int64), np.maximum(last - 1, 0).astype(np.int64))
    right, down = (position - corner).astype(np.float32).T[..., None]
    index = corner[:, 1] * width + corner[:, 0]
    # One pixel is one machine word: gathering words is several times faster than gathering rows.
    packed = np.ascontiguousarray(flow).view(np.int32 if flow.dtype == np.int16 else np.int64)
    packed = packed.reshape(-1)
    across, along = min(width - 1, 1), min(height - 1, 1) * width

    def gather(offset: int) -> np.ndarray:
        values = packed[index + offset].view(flow.dtype).reshape(-1, 2)
        return decode_flow(values) if flow.dtype == np.int16 else values

    upper = gather(0) * (1 - right) + gather(across) * right
    lower = gather(along) * (1 - right) + gather(along + across) * right
    return upper * (1 - down) + lower * down
