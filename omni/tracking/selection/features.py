"""Features of candidates, from which the selection network scores them.

They describe, for every candidate, point and frame: the cycle consistency of its chain, its colour
distance to the query, its agreement with the other candidates, its distance from the field and the
fused path, its flow residuals, and its source. Lengths are measured at a short side of 256 pixels,
so that features do not depend on the size of the video. Their order is that of the weights of the
trained network.

Letters: K candidates, N points, T frames, F features. Every group of features is a list of tensors
that broadcast to (K, N, T).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.maths import REFERENCE_SIDE, gaussian
from omni.tracking.appearance import color_contrast, color_differences
from omni.tracking.confidence import frames_away
from omni.tracking.integration import LOOSE, STRICT, UNVERIFIED
from omni.tracking.links import Links, sample_flow
from omni.tracking.selection.candidates import FIELD, FUSED, SOURCES, Candidates

__all__ = ["candidate_features"]

FAR = 20.0
"""Pixels at which errors and distances between tracks are clamped; also those of a lost chain."""

_SIMILARITY_REACH, _SIMILARITY_COLOR = 10.0, 12.0
"""Pixels and grey levels between query and neighbour by which its weight falls to 1 / e."""

_LEVEL_SUPPORT = {STRICT: 1.0, LOOSE: 0.3, UNVERIFIED: 0.05}
"""Support by a candidate of unit weight, per level of cycle consistency."""

_FIELD_SUPPORT = 0.3
"""Support by the field, which has no cycles."""

_KERNELS = (1.0, 3.0)
"""Standard deviations in pixels of the Gaussian kernels for the agreement in one frame."""

_TRACK_KERNEL = 1.5
"""Mean distance in pixels of two tracks by which their agreement falls to 1 / e."""

_GAPS = (1, 4)
"""Frames over which flow residuals and the divergence near the query are measured."""


@dataclass
class _Shared:
    """Tensors that several groups of features are computed from.

    Attributes:
        xy: (K, N, T, 2) positions, pixels at a short side of 256.
        strict, loose, unverified: (K, N, T) 0 or 1 for each level of cycle consistency.
        distance: (K, N) from the query to the neighbour's node, pixels at a short side of 256.
        contrast: (2, K, N) colour contrast between the two, grey levels.
        similarity: (K, N) weight of a candidate by proximity and colour of its node.
        support: (K, N, T) the same, times the reliability of its state in a frame.
        comparable: (K, N, T) 1 where a candidate is compared with others along its track.
    """

    xy: Tensor
    strict: Tensor
    loose: Tensor
    unverified: Tensor
    distance: Tensor
    contrast: Tensor
    similarity: Tensor
    support: Tensor
    comparable: Tensor


def candidate_features(
    candidates: Candidates,
    seen: np.ndarray,
    links: Links,
    video: np.ndarray,
    frames: np.ndarray,
    device: torch.device,
) -> Tensor:
    """Features `(N, T, K, F)` float32 of all candidates, independent of the video's size.

    Args:
        candidates: of N points.
        seen: (N, T) visibility by the field.
        links: the flows.
        video: (T, h, w, 3) uint8.
        frames: (N,) query frames.
        device: where to compute.
    """
    scale = min(links.size) / REFERENCE_SIDE
    shared = _shared(candidates, video, frames, scale, device)
    agreement, agreement_near = _agreement_features(shared)
    values = [
        *_chain_features(candidates, shared, scale),
        *_color_features(candidates, shared, video, frames),
        *agreement,
        *_flow_features(candidates, links, frames, scale, device),
        *_source_features(shared),
        *_point_features(shared, seen, frames, agreement_near),
    ]
    shape = candidates.level.shape
    return torch.stack([value.expand(shape) for value in values]).permute(2, 3, 1, 0)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float32, device=device)


def _shared(
    candidates: Candidates,
    video: np.ndarray,
    frames: np.ndarray,
    scale: float,
    device: torch.device,
) -> _Shared:
    queries = candidates.xy[FUSED, np.arange(len(frames)), frames]
    contrast = _tensor(color_contrast(video, queries, frames, candidates.offset), device)
    levels = {level: _tensor(candidates.level == level, device) for level in _LEVEL_SUPPORT}
    valid = _tensor(candidates.valid, device)
    distance = _tensor(np.linalg.norm(candidates.offset, axis=-1), device) / scale
    similarity = valid * torch.exp(-contrast[0] / _SIMILARITY_COLOR - distance / _SIMILARITY_REACH)
    strict, loose, unverified = (weight * levels[level] for level, weight in _LEVEL_SUPPORT.items())
    support = similarity[..., None] * (strict + loose + unverified)
    support[FIELD] = _FIELD_SUPPORT
    # Direct and adjacent flow repeat the evidence of the other candidates.
    repeated = slice(FIELD + 2, len(SOURCES))
    similarity[repeated] = support[repeated] = 0
    comparable = levels[STRICT].clone()
    comparable[FIELD] = 1
    return _Shared(
        xy=_tensor(candidates.xy, device) / scale,
        strict=levels[STRICT],
        loose=levels[LOOSE],
        unverified=levels[UNVERIFIED],
        distance=distance,
        contrast=contrast,
        similarity=similarity,
        support=support,
        comparable=comparable,
    )


def _chain_features(candidates: Candidates, shared: _Shared, scale: float) -> list[Tensor]:
    """States of each candidate's chain."""
    device = shared.xy.device
    known = (candidates.level == STRICT) | (candidates.level == LOOSE)
    away = np.stack([frames_away(level == STRICT) for level in candidates.level])

    def log_length(pixels: np.ndarray) -> Tensor:
        clamped = np.where(known, np.minimum(pixels / scale, FAR), FAR)
        return torch.log(_tensor(clamped, device) + 0.1)

    return [
        shared.strict,
        shared.loose,
        shared.unverified,
        log_length(candidates.sigma),
        log_length(candidates.error),
        _tensor(np.minimum(candidates.num_fused, 6) / 6, device),
        torch.log1p(_tensor(np.minimum(away, 30), device)),
        _tensor(candidates.occluded, device),
        torch.log(_tensor(np.clip(candidates.stretch, 1, 8), device)),
        shared.strict.mean(-1)[..., None],
    ]


def _color_features(
    candidates: Candidates, shared: _Shared, video: np.ndarray, frames: np.ndarray
) -> list[Tensor]:
    """Colour distances in each frame, and their means over the comparable frames of the track."""
    reliable = candidates.level[FUSED] == STRICT
    reliable[np.arange(len(frames)), frames] = True
    differences = color_differences(video, candidates.xy, frames, reliable)
    colors = torch.log(_tensor(differences, shared.xy.device) + 1)
    comparable = shared.comparable
    typical = (comparable * colors).sum(-1) / (comparable.sum(-1) + 1)
    return [*colors, *typical[..., None]]


def _agreement_features(shared: _Shared) -> tuple[list[Tensor], Tensor]:
    """Agreement with other candidates and distances from field and fused path.

    Returns:
        the features, and the agreement (K, N, T) within the narrowest kernel.
    """
    near, along, mean_distance = _agreement(shared)
    xy = shared.xy
    from_field = torch.log((xy - xy[FIELD]).norm(dim=-1).clamp(max=50) + 0.3)
    from_fused = torch.log((xy - xy[FUSED]).norm(dim=-1).clamp(max=50) + 0.3)
    features = [
        *near,
        along[..., None],
        from_field,
        from_field.mean(-1)[..., None],
        from_fused,
        torch.log(mean_distance + 0.3)[..., None],
    ]
    return features, near[0]


def _agreement(shared: _Shared) -> tuple[Tensor, Tensor, Tensor]:
    """Agreement of each candidate with all others.

    Returns:
        (2, K, N, T) share of the others' support within the kernels in each frame, (K, N) share of
        the others' similarity weight that agrees along the whole track, and (K, N) mean distance
        from the fused path, pixels at a short side of 256.
    """
    similarity, support, comparable = shared.similarity, shared.support, shared.comparable
    total_support, total_similarity = support.sum(0), similarity.sum(0)
    near, along, distances = [], [], []
    x, y = (axis.contiguous() for axis in shared.xy.unbind(-1))
    for k in range(len(x)):
        squared = (x - x[k]).square() + (y - y[k]).square()
        distance = squared.sqrt()
        others = total_support - support[k] + 0.1
        kernels = [gaussian(squared, width) for width in _KERNELS]
        near.append(
            torch.stack([((one * support).sum(0) - support[k]) / others for one in kernels])
        )
        both = comparable * comparable[k]
        mean_distance = (distance.clamp(max=FAR) * both).sum(-1) / (both.sum(-1) + 1)
        distances.append(mean_distance)
        agreement = torch.exp(-mean_distance / _TRACK_KERNEL)
        along.append(
            ((agreement * similarity).sum(0) - agreement[k] * similarity[k])
            / (total_similarity - similarity[k] + 0.3)
        )
    return torch.stack(near, dim=1), torch.stack(along), distances[FUSED]


def _flow_features(
    candidates: Candidates,
    links: Links,
    frames: np.ndarray,
    scale: float,
    device: torch.device,
) -> list[Tensor]:
    """Flow residuals in each frame, and the divergence from the fused path near the query."""

    def log_length(pixels: np.ndarray) -> Tensor:
        return torch.log(_tensor(pixels, device).clamp(max=FAR * scale) / scale + 0.1)

    residuals = log_length(_flow_residuals(links, candidates.xy))
    return [*residuals, *log_length(_divergence(candidates.xy, frames))[..., None]]


def _flow_residuals(links: Links, xy: np.ndarray) -> np.ndarray:
    """Distance between a candidate's motion and the stored flow at its position, pixels.

    A candidate that has left its surface moves differently from the surface it lies on.

    Returns:
        (4, K, N, T): to the frame one later, one earlier, four later, four earlier; 0 where no
        flow is stored.
    """
    times = xy.shape[2]
    result = np.zeros((2 * len(_GAPS), *xy.shape[:3]), np.float32)
    for row, step in enumerate(sign * gap for gap in _GAPS for sign in (1, -1)):
        for t in range(max(0, -step), min(times, times - step)):
            if links.stored(t, t + step):
                start = xy[:, :, t].reshape(-1, 2)
                flow = sample_flow(links.fields(t, t + step)[0], start)
                residual = start + flow - xy[:, :, t + step].reshape(-1, 2)
                result[row, :, :, t] = np.linalg.norm(residual, axis=-1).reshape(xy.shape[:2])
                links.release()
    return result


def _divergence(xy: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Distance `(2, K, N)` from the fused path near the query, pixels.

    One and four frames from the query, the larger value of before and after.
    """
    distance = np.linalg.norm(xy - xy[FUSED], axis=-1)
    points, last = np.arange(len(frames)), xy.shape[2] - 1
    sides = [
        [distance[:, points, np.clip(frames + sign * gap, 0, last)] for sign in (1, -1)]
        for gap in _GAPS
    ]
    return np.stack([np.maximum(*pair) for pair in sides])


def _source_features(shared: _Shared) -> list[Tensor]:
    """Position of a neighbour's node relative to the query, and a one-hot code of the source."""
    num_candidates = len(shared.xy)
    one_hot = torch.eye(len(SOURCES), device=shared.xy.device)
    one_hot = F.pad(one_hot, (0, 0, 0, num_candidates - len(SOURCES))).T[:, :, None, None]
    return [
        torch.log1p(shared.distance)[..., None],
        *torch.log(shared.contrast + 2)[..., None],
        *one_hot,
    ]


def _point_features(
    shared: _Shared, seen: np.ndarray, frames: np.ndarray, agreement_near: Tensor
) -> list[Tensor]:
    """Features that all candidates of a point share."""
    device, num_frames = shared.xy.device, shared.xy.shape[2]
    age = np.abs(np.arange(num_frames) - frames[:, None])
    total = shared.support.sum(0) / (shared.similarity.sum(0)[:, None] + 0.1)
    return [
        torch.log1p(_tensor(age, device)),
        _tensor(seen, device),
        total,
        agreement_near.amax(0),
    ]
