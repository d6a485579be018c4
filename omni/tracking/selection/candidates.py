"""Track hypotheses for every point: K candidates with a position in every frame.

A track that slides onto another surface at a motion border is often cycle consistent and photo
consistent all the same. The track of a point a few pixels away may have stayed on the surface, and
so may a simpler way of chaining flows. So each point gets several candidates, among which
`omni.tracking.selection.network` selects frame by frame. Their sources, in order:

- `fused path`: the point's own chain, bridged by the field (see `omni.tracking.fusion`);
- `field`: the estimate of the fitted field alone;
- `mft`, `direct`, `chain`: flow alone (see `omni.tracking.selection.flow_tracks`);
- neighbours: the chains of grid nodes around the query, moved by their offset to it.

Queries close to each other share their nodes, so that a dense export integrates few more chains
than it has points.

Letters: K candidates, N points, T frames, U nodes, C cells. Raster pixels of the processing
resolution.
"""

from dataclasses import dataclass, fields

import numpy as np

from omni.maths import REFERENCE_SIDE, Camera
from omni.store import Store
from omni.tracking.fusion import FieldEstimate
from omni.tracking.integration import LOOSE, LOST, Chains, States, integrate
from omni.tracking.landmarks import Landmarks
from omni.tracking.links import Links
from omni.tracking.selection.flow_tracks import Method, trace

__all__ = ["FIELD", "FUSED", "NUM_CANDIDATES", "SOURCES", "Candidates", "gather_candidates"]

FLOW_ONLY: tuple[Method, ...] = ("mft", "direct", "chain")
FUSED, FIELD = 0, 1
SOURCES = ("fused path", "field", *FLOW_ONLY)
"""Sources of the first candidates; the others are neighbours, one for each cell of the stencil."""

PITCH = 4.0
"""Pixels between nodes at a short side of 256."""

_EIGHT = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y])
_FAR = np.where(np.abs(_EIGHT).sum(1, keepdims=True) == 1, 4, 3) * _EIGHT
STENCIL = np.concatenate([[(0, 0)], _EIGHT, 2 * _EIGHT, _FAR])
"""Cells (C, 2), x y, relative to that of the query."""

NUM_CANDIDATES = len(SOURCES) + len(STENCIL)

_STATES = [state.name for state in fields(States) if state.name != "xy"]


@dataclass
class Candidates(States):
    """K track hypotheses of N points in T frames: xy (K, N, T, 2), other states (K, N, T).

    Along the first axis lie, in this order: the fused path, the field, flow alone by the methods
    `mft`, `direct` and `chain`, and one neighbour for each cell of STENCIL. The fused path has the
    states of the point's own chain, a neighbour those of its node's chain. The field and flow
    alone have no cycles: their error is inf, and their level LOST, or LOOSE where a track by flow
    alone is visible; only flow alone has a sigma.

    Attributes:
        offset: (K, N, 2) from each query to the neighbour's node in the query frame, 0 for others.
        valid: (K, N) bool; False for a neighbour outside the frame or on another masked object.
    """

    offset: np.ndarray
    valid: np.ndarray


def gather_candidates(
    store: Store,
    camera: Camera,
    landmarks: Landmarks,
    chains: Chains,
    path: np.ndarray,
    field: FieldEstimate,
    frames: np.ndarray,
) -> Candidates:
    """All candidates of N points.

    Memory is that of the result, 26 bytes for each of K N T, and of the nodes' chains.

    Args:
        store: finished preprocessing.
        camera: its global motion, which moves neighbours' offsets along.
        landmarks: its feature matches.
        chains: the points' own chains.
        path: (N, T, 2) their fused paths, processing pixels.
        field: the field's estimate.
        frames: (N,) query frames.
    """
    links, points = Links(store), np.arange(len(frames))
    xy = chains.queries(frames)
    (node_frames, node_xy), index, offset, valid = _nodes(links, frames, xy)
    around = integrate(links, node_frames, node_xy, landmarks)
    candidates = Candidates(
        xy=np.empty((NUM_CANDIDATES, *path.shape), np.float32),
        **{name: _stacked(getattr(chains, name), getattr(around, name), index) for name in _STATES},
        offset=np.concatenate([np.zeros((len(SOURCES), *xy.shape)), offset]).astype(np.float32),
        valid=np.concatenate([np.ones((len(SOURCES), len(xy)), bool), valid]),
    )
    candidates.xy[FUSED], candidates.xy[FIELD] = path, field.xy
    candidates.xy[FUSED, points, frames] = xy
    _clear_states(candidates, FIELD)
    for k, method in enumerate(FLOW_ONLY, FIELD + 1):
        _clear_states(candidates, k)
        candidates.xy[k], candidates.sigma[k], visible = trace(store, frames, xy, method)
        candidates.level[k] = np.where(visible, LOOSE, LOST)
    candidates.xy[len(SOURCES) :] = _with_offset(camera, around, index, frames, xy)
    return candidates


def _nodes(
    links: Links, frames: np.ndarray, xy: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Grid nodes around points, shared between them.

    Returns:
        frames (U,) and positions (U, 2) of the nodes; for each cell and point the index (C, N) of
        its node, the offset (C, N, 2) to it, and whether it is valid (C, N).
    """
    pitch = PITCH * min(links.size) / REFERENCE_SIDE
    cell = np.floor(xy / pitch).astype(int) + STENCIL[:, None]
    height, width = links.size
    # A cell cut by the border has its node within the frame, so that every query has a node.
    valid = ((cell >= 0) & (cell * pitch < (width, height))).all(-1)
    place = np.clip((cell + 0.5) * pitch, 0.5, (width - 0.5, height - 0.5)).astype(np.float32)
    key = np.concatenate([np.broadcast_to(frames[:, None], (*valid.shape, 1)), cell], axis=-1)
    unique, first, inverse = np.unique(key[valid], axis=0, return_index=True, return_inverse=True)
    index = np.zeros(valid.shape, int)
    index[valid] = inverse.ravel()
    nodes = unique[:, 0], place[valid][first]
    for frame in np.unique(frames):
        rows = np.flatnonzero(frames == frame)
        same = links.labels(int(frame), place[:, rows].reshape(-1, 2)).reshape(-1, len(rows))
        valid[:, rows] &= same == links.labels(int(frame), xy[rows])
    return nodes, index, place - xy, valid


def _stacked(own: np.ndarray, around: np.ndarray, index: np.ndarray) -> np.ndarray:
    """One state (K, N, T) of all candidates: that of the point's chain, except for neighbours."""
    first = np.broadcast_to(own.T, (len(SOURCES), *own.T.shape))
    return np.concatenate([first, around.T[index]])


def _clear_states(candidates: Candidates, k: int) -> None:
    """Set the states of a candidate that is not a chain, and so has no cycle consistency."""
    candidates.sigma[k] = candidates.error[k] = np.inf
    candidates.level[k] = candidates.num_fused[k] = candidates.occluded[k] = 0
    candidates.stretch[k] = 1


def _with_offset(
    camera: Camera, around: Chains, index: np.ndarray, frames: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Positions (C, N, T, 2): each node's chain, moved by the offset between node and query.

    The offset is constant in the stabilised plane, and so turns and scales with the camera.
    """
    cells, count, num_frames = *index.shape, len(around.xy)
    points = np.arange(count)
    still = np.broadcast_to(xy[:, None], (count, num_frames, 2))
    query = camera.stabilize(still)[points, frames]
    node = camera.stabilize(around.xy.transpose(1, 0, 2)).astype(np.float32)[index]
    node += (query - node[:, points, frames]).astype(np.float32)[:, :, None]
    flat = camera.restore(node.reshape(-1, num_frames, 2), np.arange(num_frames))
    return flat.reshape(cells, count, num_frames, 2)
