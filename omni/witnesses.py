"""All who say where a point is: its settled path, the field, flow alone, and the points around it.

What goes wrong at a motion border closes its cycles and looks right to the point itself; a point a
few pixels away may have stayed on the surface, and so may one of the simpler ways of chaining
flows. So every point hears W witnesses, each of whom names a position in every frame; `consensus`
decides whom to believe when.

Neighbours are nodes of a grid, so that queries close to each other share them: a dense export
integrates few more chains than it has points.

Letters: W witnesses, N points, T frames, U nodes, C cells. Raster pixels of the processing
resolution.
"""

from dataclasses import dataclass, fields

import numpy as np

from omni.baselines import trace
from omni.camera import REFERENCE_SIDE, Camera
from omni.fusion import Witness
from omni.integration import LOOSE, LOST, Chains, States, integrate
from omni.landmarks import Landmarks
from omni.links import Links
from omni.store import Store

__all__ = ["FIELD", "NAMED", "PATH", "WITNESSES", "Witnesses", "call"]

FLOW_ALONE = ("mft", "direct", "chain")
PATH, FIELD = 0, 1
NAMED = ("path", "field", *FLOW_ALONE)
"""The first witnesses; the others are neighbours, one for each cell of the stencil."""

PITCH = 4.0
"""Pixels between nodes at a short side of 256."""

_EIGHT = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y])
_FAR = np.where(np.abs(_EIGHT).sum(1, keepdims=True) == 1, 4, 3) * _EIGHT
STENCIL = np.concatenate([[(0, 0)], _EIGHT, 2 * _EIGHT, _FAR])
"""Cells (C, 2), x y, relative to that of the query."""

WITNESSES = len(NAMED) + len(STENCIL)

_STATES = [state.name for state in fields(States) if state.name != "xy"]


@dataclass
class Witnesses(States):
    """What W witnesses say of N points in T frames: xy (W, N, T, 2), other states (W, N, T).

    offset: (W, N, 2) from each query to where the witness was in the query's frame.
    valid: (W, N) bool; False for a neighbour outside the frame or on another masked object.
    """

    offset: np.ndarray
    valid: np.ndarray


def call(
    store: Store,
    camera: Camera,
    landmarks: Landmarks,
    chains: Chains,
    path: np.ndarray,
    field: Witness,
    frames: np.ndarray,
) -> Witnesses:
    """Hear every witness of N points.

    Args:
        store: finished preprocessing.
        camera: its global motion, which carries neighbours' offsets along.
        landmarks: its feature matches.
        chains: the points' own chains.
        path: (N, T, 2) what they and the field were settled to.
        field: the field's account.
        frames: (N,) query frames.

    Memory is that of the result, 26 bytes for each of W N T, and of the nodes' chains.
    """
    links, points = Links(store), np.arange(len(frames))
    xy = chains.queries(frames)
    nodes, index, offset, valid = _nodes(links, frames, xy)
    around = integrate(links, *nodes, landmarks)
    said = Witnesses(
        xy=np.empty((WITNESSES, *path.shape), np.float32),
        **{name: _joined(getattr(chains, name), getattr(around, name), index) for name in _STATES},
        offset=np.concatenate([np.zeros((len(NAMED), *xy.shape)), offset]).astype(np.float32),
        valid=np.concatenate([np.ones((len(NAMED), len(xy)), bool), valid]),
    )
    said.xy[PATH], said.xy[FIELD] = path, field.xy
    said.xy[PATH, points, frames] = xy
    _nothing(said, FIELD)
    for witness, method in enumerate(FLOW_ALONE, FIELD + 1):
        _nothing(said, witness)
        said.xy[witness], said.sigma[witness], seen = trace(store, frames, xy, method)
        said.level[witness] = np.where(seen, LOOSE, LOST)
    said.xy[len(NAMED) :] = _carried(camera, around, index, frames, xy)
    return said


def _nodes(links: Links, frames: np.ndarray, xy: np.ndarray):
    """Grid nodes around points: (frames (U,), positions (U, 2)), index (C, N), offset (C, N, 2)
    and validity (C, N).
    """
    pitch = PITCH * min(links.size) / REFERENCE_SIDE
    cell = np.floor(xy / pitch).astype(int) + STENCIL[:, None]
    height, width = links.size
    # A cell cut by the border has its node in what is left of it, so that no query has none.
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


def _joined(own: np.ndarray, around: np.ndarray, index: np.ndarray) -> np.ndarray:
    """One state (W, N, T) of all witnesses: named ones start as the point's own chain."""
    named = np.broadcast_to(own.T, (len(NAMED), *own.T.shape))
    return np.concatenate([named, around.T[index]])


def _nothing(said: Witnesses, witness: int) -> None:
    """A witness that knows nothing of cycles."""
    said.sigma[witness] = said.error[witness] = np.inf
    said.level[witness] = said.agree[witness] = said.covered[witness] = 0
    said.stretch[witness] = 1


def _carried(
    camera: Camera, around: Chains, index: np.ndarray, frames: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Positions (C, N, T, 2): each node's path with the query's offset, kept on the stabilised
    plane.
    """
    cells, count, num_frames = *index.shape, len(around.xy)
    points = np.arange(count)
    still = np.broadcast_to(xy[:, None], (count, num_frames, 2))
    query = camera.stabilize(still)[points, frames]
    node = camera.stabilize(around.xy.transpose(1, 0, 2)).astype(np.float32)[index]
    node += (query - node[:, points, frames]).astype(np.float32)[:, :, None]
    flat = camera.restore(node.reshape(-1, num_frames, 2), np.arange(num_frames))
    return flat.reshape(cells, count, num_frames, 2)
