"""What the flows say before any learning: a first depth order, long tracks.

Everything is fitted to adjacent flows. Letters: T frames, h x w processing size.
"""

import cv2
import numpy as np
import torch

from omni.camera import REFERENCE_SIDE
from omni.coords import normalize, pixel_centers, rescale
from omni.integration import STRICT, integrate
from omni.links import Links
from omni.sampling import LongTracks
from omni.store import Store, decode_flow
from omni.tracks import Tracks

__all__ = ["chain_tracks", "imported_tracks", "surface_depth"]

MAX_TRACKS = 12000
"""Most tracks integrated as long-range supervision."""

TRACK_FRAMES = 8
"""Frames between the query frames of those tracks."""


def surface_depth(store: Store, motion: np.ndarray, cells: int) -> np.ndarray:
    """First surface maps `(T, cells, cells)`: what moves against the background lies nearer.

    depth = 1.3 - 0.6 tanh(m / 2), m the mean residual motion in pixels per frame.
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


def chain_tracks(store: Store) -> LongTracks:
    """Integrated chains from a grid of points on every 8th frame (see `omni.integration`).

    They reach as far as their links close strictly, which is further than any stored flow.
    """
    frames = np.arange(0, store.num_frames, TRACK_FRAMES)
    area = store.size[0] * store.size[1]
    stride = max(4, int(np.ceil(np.sqrt(area * len(frames) / MAX_TRACKS))))
    points = pixel_centers(store.size, stride).reshape(-1, 2)
    chains = integrate(
        Links(store), np.repeat(frames, len(points)), np.tile(points, (len(frames), 1))
    )
    seen = chains.level == STRICT
    sigma = np.where(seen, chains.sigma, 1.0)
    return LongTracks(
        xy=torch.from_numpy(chains.xy).transpose(0, 1).contiguous(),
        sigma=torch.from_numpy(np.maximum(sigma, 0.25).astype(np.float32).T.copy()),
        seen=torch.from_numpy(seen.T.astype(np.float32)),
    )


def imported_tracks(tracks: Tracks, store: Store) -> LongTracks:
    """Another tracker's tracks as long-range supervision, trusted where it calls them visible.

    Without a sigma of their own they count as good to one original pixel.
    """
    scale = store.size[0] / store.video_size[0]
    sigma = np.where(np.isfinite(tracks.sigma), tracks.sigma, 1.0) * scale
    seen = tracks.visible & np.isfinite(tracks.tracks).all(-1)
    xy = np.nan_to_num(rescale(tracks.tracks, store.video_size, store.size))
    return LongTracks(
        xy=torch.from_numpy(xy.astype(np.float32)),
        sigma=torch.from_numpy(np.maximum(sigma, 0.25).astype(np.float32)),
        seen=torch.from_numpy(seen.astype(np.float32)),
    )
