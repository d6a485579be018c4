"""Tracks as long-range supervision of the fit: integrated chains, and another tracker's tracks."""

import numpy as np
import torch

from omni.field import LongTracks
from omni.maths import pixel_centers, rescale
from omni.store import Store
from omni.tracking.integration import STRICT, integrate
from omni.tracking.links import Links
from omni.tracking.tracks import Tracks

__all__ = ["chain_tracks", "imported_tracks", "long_tracks"]

MAX_TRACKS = 12000
"""Most tracks integrated as long-range supervision."""

TRACK_FRAMES = 8
"""Frames between the query frames of those tracks."""


def long_tracks(store: Store, matches: Tracks | None) -> LongTracks:
    """Supervision of a fit beyond the longest stored flow: chains, and imported tracks if any."""
    chains = chain_tracks(store)
    return chains if matches is None else chains.joined(imported_tracks(matches, store))


def chain_tracks(store: Store) -> LongTracks:
    """Integrated chains from a grid of points on every 8th frame (see `omni.tracking.integration`).

    A track is used as far as its chain is STRICT, which is farther than any stored flow.
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
    """Another tracker's tracks as long-range supervision, used where it predicts them visible.

    Where they have no sigma it is taken to be one original pixel.
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
