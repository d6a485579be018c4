"""Motion layers: long tracks grouped by affine motions, and the layer that each pixel shows.

Everything happens in the stabilised plane, where the global motion is removed. Distances are in
pixels at a short side of REFERENCE_SIDE. Letters: M tracks, T frames, P layers, C cells along a
side of a layer map, N points.

Source: Wang and Adelson, Representing moving images with layers, 1994.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from omni.field.sampling import LongTracks
from omni.maths import REFERENCE_SIDE, decode_flow, normalize, pixel_centers, unpack_evidence
from omni.store import Store

__all__ = ["find_layers"]

MOST_TRACKS = 4000
"""Tracks that are grouped, at most: more of them make no difference."""

STRIDE = 4
"""Frames, besides 1, over which motions are compared: long enough to tell slow ones apart."""

ROUNDS = 12
"""Alternations of fitting every layer's motion and assigning every track to a layer."""

FEWEST = 6
"""Tracks below which a layer's motion between two frames is unknown."""

ADJUSTMENTS = 20
"""Alternations by which the drift of composed motions is removed."""

NOISE, CAP = 0.5, 4.0
"""A typical error, and the error above which all count alike."""

REACH = 8.0
"""Distance from the nearest track of a layer that costs a pixel as much as an error of 1."""

RIDGE = np.diag([0.3, 0.3, 0.03])
"""Holds the motion of few tracks near that of the background; squares of normalised coordinates."""


@dataclass(frozen=True)
class _Tracks:
    """Tracks in the stabilised plane.

    Attributes:
        xy: (M, T, 2) normalised.
        seen: (M, T).
        pixels: (2,) pixels per normalised unit.
    """

    xy: np.ndarray
    seen: np.ndarray
    pixels: np.ndarray


def find_layers(
    store: Store, motion: np.ndarray, tracks: LongTracks, layers: int, cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Motion of every layer, and where it is visible; the fastest is the first and the nearest.

    Args:
        store: finished preprocessing.
        motion: `(T, 2, 3)` maps of `global_motion`.
        tracks: long tracks through the video.
        layers: P.
        cells: C.

    Returns:
        `(P, T, 2, 3)` maps from the stabilised plane of every frame to that of the middle frame,
        and `(T, C, C)` indices of layers.
    """
    whole = np.tile(np.eye(3), (store.num_frames, 1, 1))
    whole[:, :2] = motion
    pixels = np.array(store.size[::-1]) / 2 * (REFERENCE_SIDE / min(store.size))
    kept = np.flatnonzero(tracks.seen.sum(1).numpy() > 1)
    kept = kept[:: max(1, len(kept) // MOST_TRACKS)]
    seen = tracks.seen.numpy()[kept] > 0
    xy = normalize(tracks.xy.numpy()[kept].astype(np.float64), store.size)
    stable = _Tracks((whole[:, :2, :2] @ xy[..., None])[..., 0] + whole[:, :2, 2], seen, pixels)
    if len(kept) <= layers:
        still = np.tile(np.eye(3, dtype=np.float32)[:2], (layers, store.num_frames, 1, 1))
        return still, np.full((store.num_frames, cells, cells), layers - 1)
    label = _grouped(stable, layers)
    maps = _composed(_steps(stable, label, layers, 1))
    for p in range(layers):
        mine = label == p
        maps[p] = _adjusted(maps[p], _Tracks(stable.xy[mine], seen[mine], pixels))
    shown = np.stack(
        [
            _shown(store, t, maps @ whole, xy[seen[:, t], t], label[seen[:, t]], cells)
            for t in range(store.num_frames)
        ]
    )
    return maps[:, :, :2].astype(np.float32), shown


def _grouped(tracks: _Tracks, layers: int) -> np.ndarray:
    """Layer `(M,)` of each track: alternately fit every layer's motion and reassign tracks."""
    both = (tracks.seen[:, 1:] & tracks.seen[:, :-1])[..., None]
    count = np.maximum(both.sum(1), 1)
    steps = np.diff(tracks.xy, axis=1) * tracks.pixels * both
    place = (tracks.xy * tracks.seen[..., None]).sum(1) / tracks.seen.sum(1, keepdims=True)
    feature = np.column_stack([np.arcsinh(2 * steps.sum(1) / count), place]).astype(np.float32)
    rule = (cv2.TERM_CRITERIA_MAX_ITER, 20, 0.0)
    cv2.setRNGSeed(0)
    label = np.zeros((len(feature), 1), np.int32)
    cv2.kmeans(feature, layers, label, rule, 3, cv2.KMEANS_PP_CENTERS)
    label = label[:, 0]
    for _ in range(ROUNDS):
        error, pairs = np.zeros((len(label), layers)), np.zeros((len(label), 1))
        for gap in (1, STRIDE):
            found = _steps(tracks, label, layers, gap)
            for start, step in zip(_starts(tracks, gap), found, strict=True):
                index, before, after = _both_ends(tracks, start, gap)
                error[index] += _errors(step, before, after, tracks.pixels)
                pairs[index] += 1
        label = (error / np.maximum(pairs, 1)).argmin(1)
    speed = np.linalg.norm(steps, axis=-1).sum(1) / count[:, 0]
    total = np.bincount(label, minlength=layers)
    order = np.argsort(-np.bincount(label, speed, layers) / np.maximum(total, 1), kind="stable")
    return np.argsort(order)[label]


def _starts(tracks: _Tracks, gap: int) -> range:
    return range(0, tracks.seen.shape[1] - gap, gap)


def _both_ends(tracks: _Tracks, start: int, gap: int) -> tuple[np.ndarray, ...]:
    """Indices `(N,)` of the tracks seen at both ends of a step, and both positions `(N, 2)`."""
    index = np.flatnonzero(tracks.seen[:, start] & tracks.seen[:, start + gap])
    return index, tracks.xy[index, start], tracks.xy[index, start + gap]


def _steps(tracks: _Tracks, label: np.ndarray, layers: int, gap: int) -> list[np.ndarray]:
    """Robust affine displacements `(P, 2, 3)` from every `gap`-th frame to the one `gap` later.

    NaN where a layer has too few tracks.
    """
    member = (label[:, None] == np.arange(layers)).astype(np.float64)
    result = []
    for start in _starts(tracks, gap):
        index, before, after = _both_ends(tracks, start, gap)
        design = np.column_stack([before, np.ones(len(before))])
        square = (design[:, :, None] * design[:, None]).reshape(-1, 9)
        target = (design[:, :, None] * (after - before)[:, None]).reshape(-1, 6)
        share = member[index]
        step = _displacements(share, square, target)
        error = _errors(step, before, after, tracks.pixels)
        step = _displacements(share / (1 + (error / NOISE) ** 2), square, target)
        step[share.sum(0) < FEWEST] = np.nan
        result.append(step)
    return result


def _displacements(share: np.ndarray, square: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares `(P, 2, 3)` under weights `(N, P)` of equations `(N, 9)` and `(N, 6)`."""
    left = (share.T @ square).reshape(-1, 3, 3) + RIDGE
    return np.linalg.solve(left, (share.T @ target).reshape(-1, 3, 2)).swapaxes(1, 2)


def _errors(
    step: np.ndarray, before: np.ndarray, after: np.ndarray, pixels: np.ndarray
) -> np.ndarray:
    """Errors `(N, P)`, at most CAP, of displacing points `(N, 2)` by each layer's `(P, 2, 3)`."""
    displacement = (after - before) * pixels
    design = np.column_stack([before, np.ones(len(before)), displacement]).astype(np.float32)
    scaled = (step * pixels[:, None]).astype(np.float32)
    x = design[:, :3] @ scaled[:, 0].T - design[:, 3:4]
    y = design[:, :3] @ scaled[:, 1].T - design[:, 4:]
    # In place: these arrays are large, and time goes into moving them.
    np.square(x, out=x)
    np.square(y, out=y)
    np.add(x, y, out=x)
    return np.fmin(np.sqrt(x, out=x), np.float32(CAP), out=x)  # CAP where it is unknown


def _composed(steps: list[np.ndarray]) -> np.ndarray:
    """Maps `(P, T, 3, 3)` to the middle frame from the displacements between adjacent frames.

    Where a layer is not seen they are interpolated: it moves on behind what hides it.
    """
    known = np.stack(steps, axis=1)
    layers, count = known.shape[:2]
    times, full = np.arange(count), np.tile(np.eye(3), (layers, count, 1, 1))
    for p in range(layers):
        seen = np.isfinite(known[p, :, 0, 0])
        for i, j in np.ndindex(2, 3):
            if seen.any():
                full[p, :, i, j] += np.interp(times, times[seen], known[p, seen, i, j])
    maps, middle = np.tile(np.eye(3), (layers, count + 1, 1, 1)), (count + 1) // 2
    for t in range(middle, count):
        maps[:, t + 1] = maps[:, t] @ np.linalg.inv(full[:, t])
    for t in range(middle - 1, -1, -1):
        maps[:, t] = maps[:, t + 1] @ full[:, t]
    return maps


def _adjusted(maps: np.ndarray, tracks: _Tracks) -> np.ndarray:
    """Maps `(T, 3, 3)` of one layer without the drift of their composition.

    Alternately every track comes to rest where its frames put it, and every frame's map is fitted
    to those places. The map of the middle frame stays the identity.
    """
    point = np.concatenate([tracks.xy, np.ones((*tracks.seen.shape, 1))], axis=-1).swapaxes(0, 1)
    weight = tracks.seen.T.astype(np.float64)
    for _ in range(ADJUSTMENTS):
        placed = point @ maps.mT  # (T, M, 3)
        rest = (placed * weight[..., None]).sum(0) / np.maximum(weight.sum(0), 1e-9)[:, None]
        error = np.linalg.norm((placed - rest)[..., :2] * tracks.pixels, axis=-1)
        weight = tracks.seen.T / (1 + (error / NOISE) ** 2)
        left = placed.mT @ (placed * weight[..., None]) + RIDGE
        right = placed.mT @ ((rest - placed) * weight[..., None])
        maps = maps + np.linalg.solve(left, right).mT @ maps
    return np.linalg.inv(maps[len(maps) // 2]) @ maps


def _shown(
    store: Store, t: int, maps: np.ndarray, xy: np.ndarray, label: np.ndarray, cells: int
) -> np.ndarray:
    """Layer `(C, C)` in the cells of a frame: it explains the flow there and has tracks nearby.

    Args:
        store: finished preprocessing.
        t: the frame.
        maps: `(P, T, 3, 3)` from frames to rest.
        xy: `(N, 2)` normalised positions of the tracks seen in the frame.
        label: `(N,)` their layers.
        cells: C.
    """
    corner, layers = np.array(store.size[::-1]), len(maps)
    pixels = corner / 2 * (REFERENCE_SIDE / min(store.size))
    centers = pixel_centers((cells, cells)).reshape(-1, 2) * corner / cells
    column, row = np.minimum(centers.astype(int), corner - 1).T
    point, threshold = normalize(centers, store.size), store.meta("evidence")["threshold"]
    cost = np.zeros((len(point), layers), np.float32)
    count = np.full((len(point), 1), 1e-6, np.float32)
    for k, (source, target) in enumerate(store.pairs.tolist()):
        if source != t or abs(source - target) not in (1, STRIDE):
            continue
        evidence = unpack_evidence(store.evidence[k][row, column])
        good = evidence.valid & (evidence.error <= threshold)
        flow = decode_flow(store.flow[k][row, column]) * (2 / corner)
        step = np.linalg.inv(maps[:, target]) @ maps[:, t] - np.eye(3)
        errors = _errors(step[:, :2], point, point + flow, pixels)
        errors *= good[:, None]
        cost += errors
        count += good[:, None]
    place = np.clip((xy + 1) * cells / 2, 0, cells - 1).astype(int)
    total = np.empty((layers, cells, cells), np.float32)
    for p, errors in enumerate((cost / count).T):
        free = np.ones((cells, cells), np.uint8)
        column, row = place[label == p].T
        free[row, column] = 0
        far = cv2.distanceTransform(free, cv2.DIST_L2, 5) if len(row) else 4.0 * cells
        near = np.minimum(far * (REFERENCE_SIDE / cells) / REACH, 2 * CAP)
        total[p] = cv2.blur(errors.reshape(cells, cells), (3, 3)) + near
    return total.argmin(0)
