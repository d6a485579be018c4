"""Candidates of a pixel: its own chain, and the tracks of the anchors around it.

Most pixels between anchors move as one of them does, and an anchor's track was selected among all
candidates, so that few are needed here. Where the nearest four agree nothing needs selecting.

Letters: K candidates, N pixels, T frames, M of them, C anchors around a pixel. Raster pixels of the
processing resolution; all pixels belong to one query frame.
"""

from dataclasses import dataclass

import numpy as np

from omni.maths import REFERENCE_SIDE, Camera
from omni.tracking.dense.anchors import Anchors
from omni.tracking.links import Links
from omni.tracking.selection import Selection

__all__ = ["OWN", "PixelCandidates", "interpolated", "pixel_candidates"]

OWN = 0
"""The candidate that is the pixel's own chain."""

NINE = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1)), -1).reshape(-1, 2)
"""Cells (C, 2), x y, of the anchors around a pixel, relative to its own cell."""

FOUR = np.stack(np.meshgrid((0, 1), (0, 1)), -1).reshape(-1, 2)
"""Cells of the anchors at the corners of a pixel, relative to that at its upper left."""

AGREE = 2.0
"""Pixels, at a short side of 256, from their mean within which anchors agree."""

UNLIKELY = 0.1
"""Trust of all anchors around a pixel below which it is not visible, wherever it is."""


@dataclass
class PixelCandidates:
    """Candidates of N pixels: the own chain, then the anchors of NINE.

    Attributes:
        xy: (K, N, T, 2).
        valid: (K, N) bool; False for an anchor outside the frame or on another masked object.
        offset: (K, N, 2) from each pixel to the anchor in the query frame, 0 for its own chain.
        trust, visibility, sigma: (K - 1, N, T) of the anchors, see `Selection`.
    """

    xy: np.ndarray
    valid: np.ndarray
    offset: np.ndarray
    trust: np.ndarray
    visibility: np.ndarray
    sigma: np.ndarray


def pixel_candidates(
    anchors: Anchors, own: np.ndarray, camera: Camera, links: Links
) -> PixelCandidates:
    """The candidates of pixels of the anchors' frame.

    Args:
        anchors: of the whole frame.
        own: (N, T, 2) paths of the pixels' own chains.
        camera: global motion, with which offsets to anchors turn and scale.
        links: where mask labels are looked up.
    """
    xy, selected = own[:, anchors.frame], anchors.selected
    cell = np.floor(xy / anchors.pitch).astype(int) + NINE[:, None]
    index, valid = _anchors_at(anchors, cell, links.labels(anchors.frame, xy))
    offset, moved = _offsets(anchors, index, xy, camera, slice(None))
    return PixelCandidates(
        xy=np.concatenate([own[None], moved]),
        valid=np.concatenate([np.ones((1, len(xy)), bool), valid]),
        offset=np.concatenate([np.zeros((1, *xy.shape), np.float32), offset]),
        trust=selected.trust[index],
        visibility=selected.visibility[index],
        sigma=selected.sigma[index],
    )


def interpolated(
    anchors: Anchors, xy: np.ndarray, camera: Camera, links: Links, frames: slice
) -> tuple[Selection, np.ndarray]:
    """What the four anchors around each pixel say together, and where that is enough.

    Weights are bilinear, which is exact for affine motion.

    Args:
        anchors: of the whole frame.
        xy: (N, 2) pixels of their frame.
        camera: global motion, with which offsets to anchors turn and scale.
        links: where mask labels are looked up.
        frames: M consecutive frames.

    Returns:
        the means of N pixels in M frames, and (N, M) bool: the anchors agree, or none of them is
        likely to be visible.
    """
    position = xy / anchors.pitch - 0.5
    cell = np.floor(position).astype(int) + FOUR[:, None]
    weight = np.maximum(1 - np.abs(position - cell), 0).prod(-1).astype(np.float32)
    index, valid = _anchors_at(anchors, cell, links.labels(anchors.frame, xy))
    weight *= valid
    total = weight.sum(0)
    weight /= np.maximum(total, 1e-6)
    _, moved = _offsets(anchors, index, xy, camera, frames)
    mean = np.einsum("kn,knmd->nmd", weight, moved)
    scale = min(links.size) / REFERENCE_SIDE
    away = np.abs(moved - mean).max(-1)
    agreed = ((away < AGREE * scale) | (weight == 0)[..., None]).all(0)
    trust, visibility, sigma = (
        value[index, frames]
        for value in (anchors.selected.trust, anchors.selected.visibility, anchors.selected.sigma)
    )
    enough = (agreed | (trust.max(0) < UNLIKELY)) & (total > 0)[:, None]
    means = (np.einsum("kn,knm->nm", weight, value) for value in (trust, visibility, sigma))
    return Selection(mean, *means), enough


def _anchors_at(
    anchors: Anchors, cell: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the anchors at cells `(C, N, 2)`, and whether each is there, on the same label."""
    size = anchors.columns, anchors.rows
    valid = ((cell >= 0) & (cell < size)).all(-1)
    column, row = np.moveaxis(cell.clip(0, np.subtract(size, 1)), -1, 0)
    index = row * anchors.columns + column
    return index, valid & (anchors.labels[index] == labels)


def _offsets(
    anchors: Anchors, index: np.ndarray, xy: np.ndarray, camera: Camera, frames: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets `(C, N, 2)` to anchors, and where each of these says the pixel is, `(C, N, M, 2)`.

    The offset is constant in the stabilised plane.
    """
    offset = anchors.selected.xy[:, anchors.frame][index] - xy
    maps = camera.offset_maps(anchors.frame)[frames].astype(np.float32)
    return offset, anchors.selected.xy[index, frames] - np.einsum("mij,cnj->cnmi", maps, offset)
