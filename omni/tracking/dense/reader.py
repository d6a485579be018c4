"""Tracks of all pixels of a frame: anchors first, then every pixel among few candidates.

Letters: N points or pixels, T frames, M of them, K candidates, F features.
"""

from functools import cache, partial
from pathlib import Path as File

import numpy as np
import torch

from omni.maths import pixel_centers
from omni.store import Store
from omni.system import run_in_slices
from omni.tracking.confidence import Confidence
from omni.tracking.dense.anchors import Anchors
from omni.tracking.dense.candidates import PixelCandidates, interpolated, pixel_candidates
from omni.tracking.dense.features import pixel_features
from omni.tracking.fusion import Path, bridged_path, smoothed_path
from omni.tracking.integration import Chains, integrate
from omni.tracking.readout import Reader
from omni.tracking.selection import SelectionNetwork, load_network, select_rows
from omni.tracking.smoothing import Curves
from omni.tracking.tracks import Tracks

__all__ = ["DenseReader"]

CHUNK = 2**16
"""Points of the original video that are answered at once."""

AT_ONCE = 2**18
"""Positions, pixels times frames, that a thread works on at once."""

THREAD_BYTES = 2000 * AT_ONCE
"""Memory that a thread needs."""

MARGIN = 4
"""Frames before and after the times asked for that are selected too: smoothing reaches so far."""

_WEIGHTS = File(__file__).with_name("network.safetensors")


class DenseReader(Reader):
    """Tracks of any pixels of one frame, from those of its anchors.

    A processing pixel is answered by selecting among its own chain and the tracks of the anchors
    around it, and every pixel of the original video within it moves with it in the stabilised
    plane.

    Args:
        store: finished preprocessing.
        anchors: of the frame.
        matches: another tracker's tracks on the same frames, used as landmarks.
    """

    def __init__(self, store: Store, anchors: Anchors, matches: Tracks | None = None):
        super().__init__(store, None, CHUNK, matches)
        self.anchors = anchors

    def candidates_of_pixels(self, xy: np.ndarray) -> tuple[PixelCandidates, torch.Tensor]:
        """Candidates of pixels `(N, 2)` of the anchors' frame, and features `(N, T, K, F)`."""
        chains, candidates = self._candidates_of_pixels(xy)
        shape = candidates.xy.shape[1:3]
        pixel, moment = np.nonzero(np.ones(shape, bool))
        values = pixel_features(
            candidates, chains, self.frames, self.anchors.frame, (pixel, moment)
        )
        return candidates, values.unflatten(0, shape)

    def _track_points(self, points: np.ndarray, times: np.ndarray) -> tuple[Path, Confidence]:
        """As a `Reader`: every point moves with the processing pixel that it lies in."""
        frame, (height, width) = self.anchors.frame, self.size
        xy = self._query_xy(points)
        column, row = np.clip(xy, 0, (width - 1, height - 1)).astype(int).T
        unique, inverse = np.unique(row * width + column, return_inverse=True)
        pixels = pixel_centers(self.size).reshape(-1, 2)[unique]
        frames = self._frames_around(times)
        at_once = AT_ONCE // (frames.stop - frames.start)
        select = partial(self._select_pixels, pixels, frames)
        parts = run_in_slices(select, len(pixels), at_once, THREAD_BYTES)
        path, confidence = (
            Path.joined([path for path, _ in parts]),
            Confidence.joined([confidence for _, confidence in parts]),
        )
        still = np.stack([xy, pixels[inverse]])[:, :, None]
        query, pixel = (self.camera.stabilize(each, frame)[:, 0] for each in still)
        control = path.curves.control[inverse] + (query - pixel)[:, None]
        return (
            Path(Curves(control, path.curves.spacing), self.camera, path.start),
            Confidence(*(value[inverse] for value in vars(confidence).values())),
        )

    def _frames_around(self, times: np.ndarray) -> slice:
        """The frames that answer times, two at least."""
        first = max(0, int(np.floor(times.min())) - MARGIN)
        last = min(self.num_frames - 1, int(np.ceil(times.max())) + MARGIN)
        return slice(min(first, self.num_frames - 2), max(last + 1, 2))

    def _select_pixels(
        self, pixels: np.ndarray, frames: slice, rows: slice
    ) -> tuple[Path, Confidence]:
        """Paths and confidence in some frames of some of the processing pixels."""
        xy, frame = pixels[rows], self.anchors.frame
        selection, enough = interpolated(self.anchors, xy, self.camera, self.links, frames)
        which = np.flatnonzero(~enough.all(1))
        if len(which):
            chains, candidates = self._candidates_of_pixels(xy[which])
            pixel, moment = np.nonzero(~enough[which])
            place = pixel, moment + frames.start
            values = pixel_features(candidates, chains, self.frames, frame, place)
            valid, positions = candidates.valid[:, pixel].T, candidates.xy[:, *place].swapaxes(0, 1)
            found = select_rows(pixel_network(), values, valid.copy(), positions, self._scale)
            for name, value in vars(found).items():
                getattr(selection, name)[which[pixel], moment] = value
        queries = np.full(len(xy), frame)
        path = smoothed_path(selection.xy, selection.sigma, queries, xy, self.camera, frames.start)
        return path, selection.confidence()

    def _candidates_of_pixels(self, xy: np.ndarray) -> tuple[Chains, PixelCandidates]:
        frame = self.anchors.frame
        chains = integrate(self.links, np.full(len(xy), frame), xy, self.landmarks)
        own = bridged_path(chains, self.camera)
        own[:, frame] = xy
        return chains, pixel_candidates(self.anchors, own, self.camera, self.links)


@cache
def pixel_network() -> SelectionNetwork:
    """The shipped network for pixels, on the CPU."""
    return load_network(_WEIGHTS)
