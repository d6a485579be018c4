"""Baselines: trajectories from pairwise flow alone, without the field.

All three methods offer candidates for a point's position in a frame, each one link (one flow)
after a position that is already known, and keep the best candidate. They differ in the links:

- `chain`: the flow from the adjacent frame;
- `direct`: the flow from the query frame;
- `mft`: flows over the gaps 1, 2, 4, ... 32 and from the query frame; the best sigma wins among
  the candidates that are not occluded (MFT, Neoral et al., WACV 2024, with the forward-backward
  error in place of its learned uncertainty and occlusion).

Letters: N points, T frames. Raster pixels of the processing resolution inside, of the original
video at the border.
"""

from typing import get_args

import numpy as np

from omni.errors import OmniError
from omni.maths import inside, rescale
from omni.store import Store
from omni.tracking import DirectFlow, Method, Tracks, trace

__all__ = ["baseline"]


def baseline(
    store: Store,
    query_points: np.ndarray,
    method: Method,
    direct_flow: DirectFlow | None = None,
    threshold: float = 1.5,
) -> Tracks:
    """Track queries forward and backward in time through the stored flows.

    A link whose forward-backward error, taken at the point itself, exceeds `threshold`, or which
    leaves the frame, makes its candidate hidden; so does a hidden start. Where every candidate is
    hidden, tracking continues from the one of least sigma. No link crosses a cut: beyond it points
    are hidden.

    Args:
        store: with finished flows.
        query_points: (N, 3) t, y, x; raster pixels of the original video, t rounded to a frame.
        method: see the module.
        direct_flow: computes flows from the query frame that are not stored. Without it `direct`
            composes the fewest stored flows, and `mft` uses the direct flows that are stored.
        threshold: forward-backward error, processing pixels.

    Returns:
        Tracks in the original video's pixels, in the order of `query_points`. `visibility` is 0
        or 1; `sigma` grows along the links, to the frame's longer side where nothing is known.

    Raises:
        OmniError: unknown method, queries of another shape or outside the video.
    """
    if method not in get_args(Method):
        raise OmniError(f"baseline {method!r} is unknown: use one of {', '.join(get_args(Method))}")
    query_points = np.asarray(query_points, np.float32)
    _check(store, query_points)
    frames = np.rint(query_points[:, 0]).astype(int)
    xy = rescale(query_points[:, :0:-1], store.video_size, store.size)
    found = trace(store, frames, xy, method, direct_flow, threshold)
    return _tracks(store, *found, frames, query_points)


def _tracks(
    store: Store,
    xy: np.ndarray,
    sigma: np.ndarray,
    visible: np.ndarray,
    frames: np.ndarray,
    query_points: np.ndarray,
) -> Tracks:
    """What `trace` found, in the original video's pixels."""
    source, target = store.size, store.video_size
    xy = rescale(xy, source, target)
    xy[np.arange(len(xy)), frames] = query_points[:, :0:-1]
    scale = np.float32(np.sqrt(target[0] * target[1] / (source[0] * source[1])))
    return Tracks(
        tracks=xy,
        visible=visible,
        visibility=visible.astype(np.float32),
        sigma=np.minimum(sigma * scale, np.float32(max(target))),
        query_points=query_points,
        size=target,
        fps=store.fps,
    )


def _check(store: Store, query_points: np.ndarray) -> None:
    if query_points.ndim != 2 or query_points.shape[1] != 3:
        raise OmniError(f"query_points must be (N, 3), t y x, not {query_points.shape}")
    frames, size = np.rint(query_points[:, 0]), store.video_size
    valid = (frames >= 0) & (frames < store.num_frames) & inside(query_points[:, :0:-1], size)
    if not valid.all():
        bad = int(np.argmin(valid))
        raise OmniError(
            f"query {bad} (t, y, x) = {query_points[bad].tolist()} lies outside the video of "
            f"{store.num_frames} frames of {size[1]}x{size[0]} pixels: leave it out"
        )
