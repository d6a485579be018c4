"""Features of a pixel's candidates, from which the network for pixels scores them.

They are few and cheap, since there are hundreds of thousands of pixels: where a candidate comes
from, its distance from the pixel's own chain, its confidence, its agreement with the others, and
the colours where it lies. Lengths are measured at a short side of 256 pixels. Their order is that
of the weights of the trained network.

Letters: K candidates, N pixels, T frames, F features, B rows (pixels and frames).
"""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

from omni.maths import REFERENCE_SIDE, gaussian
from omni.tracking.appearance import color_contrast, sample_colors
from omni.tracking.confidence import frames_away
from omni.tracking.dense.candidates import OWN, PixelCandidates
from omni.tracking.integration import LOOSE, STRICT, UNVERIFIED, Chains

__all__ = ["pixel_features"]

FAR = 20.0
"""Pixels at which distances, errors and sigmas are clamped; also those of a lost chain."""

_SIMILARITY_REACH, _SIMILARITY_COLOR = 10.0, 12.0
"""Pixels and grey levels between pixel and anchor by which its weight falls to 1 / e."""

_KERNELS = (1.0, 3.0)
"""Standard deviations in pixels of the Gaussian kernels for the agreement in one frame."""

_GAPS = (1, 4)
"""Frames from the query at which the distance from the own chain is measured."""

_PATCH = 5
"""Side in pixels of the patch whose mean colour is compared."""

_CENTER = np.zeros((1, 2), np.float32)


def pixel_features(
    candidates: PixelCandidates,
    chains: Chains,
    video: np.ndarray,
    frame: int,
    rows: tuple[np.ndarray, np.ndarray],
) -> Tensor:
    """Features `(B, K, F)` float32 of some pixels in some frames.

    Args:
        candidates: of N pixels.
        chains: of the same.
        video: (T, h, w, 3) uint8.
        frame: the query frame.
        rows: (B,) pixels and (B,) frames.
    """
    scale = np.float32(min(video.shape[1:3]) / REFERENCE_SIDE)
    contrast = _contrast(candidates, video, frame)
    per_pixel = [*_source_features(candidates, contrast, scale)]
    per_pixel += _divergence_features(candidates, chains, frame, scale)
    shape = (*candidates.valid.shape, len(per_pixel))
    pixels = np.empty(shape, np.float32)
    for column, value in enumerate(per_pixel):
        pixels[..., column] = value
    groups = (
        _distance_features(candidates, rows, scale),
        _confidence_features(candidates, chains, rows, scale),
        _agreement_features(candidates, contrast[0], rows, scale),
        _color_features(candidates, video, frame, rows),
        _chain_features(chains, frame, rows, scale),
    )
    per_row = [value for group in groups for value in group]
    values = np.empty((len(rows[0]), shape[0], shape[2] + len(per_row)), np.float32)
    values[..., : shape[2]] = pixels[:, rows[0]].transpose(1, 0, 2)
    for column, value in enumerate(per_row, shape[2]):
        values[..., column] = value.T if value.ndim == 2 else value[:, None]
    return torch.from_numpy(values)


def _contrast(candidates: PixelCandidates, video: np.ndarray, frame: int) -> np.ndarray:
    """Grey levels `(2, K, N)`: the most on the way from pixel to anchor, and at the anchor."""
    query = candidates.xy[OWN, :, frame]
    return color_contrast(video, query, np.full(len(query), frame), candidates.offset)


def _source_features(
    candidates: PixelCandidates, contrast: np.ndarray, scale: np.float32
) -> Iterator[np.ndarray]:
    """Which candidate is the own chain, and the distances in space and colour to the anchors."""
    own = np.zeros(candidates.valid.shape, np.float32)
    own[OWN] = 1
    yield own
    yield np.log1p(np.linalg.norm(candidates.offset, axis=-1) / scale)
    yield from np.log(contrast + 2)


def _divergence_features(
    candidates: PixelCandidates, chains: Chains, frame: int, scale: np.float32
) -> Iterator[np.ndarray]:
    """Distance from the own chain: mean where that is strict, and near the query."""
    strict = (chains.level.T == STRICT).astype(np.float32)
    distance = np.minimum(_distance_from_own(candidates.xy, candidates.xy[OWN]) / scale, FAR)
    yield np.log((distance * strict).sum(-1) / (strict.sum(-1) + 1) + 0.3)
    last = distance.shape[2] - 1
    for gap in _GAPS:
        before, after = max(0, frame - gap), min(last, frame + gap)
        yield np.log(np.maximum(distance[..., before], distance[..., after]) + 0.1)


def _distance_from_own(xy: np.ndarray, own: np.ndarray) -> np.ndarray:
    difference = xy - own
    return np.sqrt(difference[..., 0] ** 2 + difference[..., 1] ** 2)


def _distance_features(
    candidates: PixelCandidates, rows: tuple[np.ndarray, np.ndarray], scale: np.float32
) -> Iterator[np.ndarray]:
    """Distance from the own chain in the frame."""
    xy = candidates.xy[:, *rows]
    yield np.log(np.minimum(_distance_from_own(xy, xy[OWN]) / scale, 50) + 0.3)


def _confidence_features(
    candidates: PixelCandidates,
    chains: Chains,
    rows: tuple[np.ndarray, np.ndarray],
    scale: np.float32,
) -> Iterator[np.ndarray]:
    """Visibility, trust and sigma: an anchor's predicted ones, and levels of the own chain."""
    level = chains.level.T[rows]
    known = level >= LOOSE
    sigma = np.where(known, chains.sigma.T[rows], FAR * scale)
    yield np.concatenate([known[None], candidates.visibility[:, *rows]])
    yield np.concatenate([(level == STRICT)[None], candidates.trust[:, *rows]])
    both = np.concatenate([sigma[None], candidates.sigma[:, *rows]]) / scale
    yield np.log(np.minimum(both, FAR) + 0.1)


def _agreement_features(
    candidates: PixelCandidates,
    contrast: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    scale: np.float32,
) -> Iterator[np.ndarray]:
    """Share of the other candidates, weighted by similarity, within the kernels."""
    distance = np.linalg.norm(candidates.offset, axis=-1) / scale
    weight = np.exp(-contrast / _SIMILARITY_COLOR - distance / _SIMILARITY_REACH)
    weight = (candidates.valid * weight)[:, rows[0]].astype(np.float32)
    total = weight.sum(0)
    xy = candidates.xy[:, *rows] / scale
    x, y = np.ascontiguousarray(xy[..., 0]), np.ascontiguousarray(xy[..., 1])
    shares = np.empty((len(_KERNELS), *x.shape), np.float32)
    for k in range(len(x)):
        squared = (x - x[k]) ** 2 + (y - y[k]) ** 2
        for share, width in zip(shares, _KERNELS, strict=True):
            near = gaussian(torch.from_numpy(squared), width).numpy()
            others = np.einsum("kb,kb->b", near, weight) - weight[k]
            share[k] = others / (total - weight[k] + np.float32(0.1))
    yield from shares
    yield shares[0].max(0)


def _color_features(
    candidates: PixelCandidates,
    video: np.ndarray,
    frame: int,
    rows: tuple[np.ndarray, np.ndarray],
) -> Iterator[np.ndarray]:
    """Colour distances between the query and where a candidate is, of pixels and of patches."""
    pixels, times = rows
    xy = candidates.xy[:, *rows]
    query = candidates.xy[OWN, :, frame]
    order = np.argsort(times, kind="stable")
    bounds = np.searchsorted(times[order], np.arange(len(video) + 1))
    for side in (1, _PATCH):
        reference = _colors(_blurred(video[frame], side), query)[pixels]
        apart = np.empty(xy.shape[:2], np.float32)
        for t in np.unique(times):
            some = order[bounds[t] : bounds[t + 1]]
            found = _colors(_blurred(video[t], side), xy[:, some].reshape(-1, 2))
            difference = np.abs(found.reshape(len(xy), -1, 3) - reference[some])
            apart[:, some] = difference.mean(-1)
        yield np.log1p(apart)


def _blurred(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.blur(np.ascontiguousarray(image), (side, side))


def _colors(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Bilinear colours `(n, 3)` float32 at points `(n, 2)`, border pixels repeated."""
    return sample_colors(image, xy, _CENTER)[:, 0].astype(np.float32)


def _chain_features(
    chains: Chains, frame: int, rows: tuple[np.ndarray, np.ndarray], scale: np.float32
) -> Iterator[np.ndarray]:
    """How reliable the own chain is; equal for all candidates."""
    strict = chains.level.T == STRICT
    level = chains.level.T[rows]
    yield from (strict[rows], level == LOOSE, level == UNVERIFIED)
    error = np.where(level >= LOOSE, chains.error.T[rows] / scale, FAR)
    yield np.log(np.minimum(error, FAR) + 0.1)
    yield np.log1p(np.minimum(frames_away(strict), 30))[rows]
    yield chains.occluded.T[rows]
    yield np.log(np.clip(chains.stretch.T[rows], 1, 8))
    yield np.log1p(np.abs(rows[1] - frame))
