"""Dense flow without any weights: OpenCV's DIS, refined, then sharpened at motion borders.

The constants were selected by measurement (docs/experiments.md). Refinement fills textureless
areas, block matching finds small objects that move far, sharpening takes back what refinement
smears across borders, composed starts make far flows usable.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from preprocess.blockmatch import block_match
from preprocess.motion import Motion
from preprocess.photoconsistency import PhotoConsistency

__all__ = ["DisFlow"]

_NEAR_SCALES = (0.25, 0.31, 0.38, 0.46, 0.57, 0.7, 0.85, 1.0)
_RESTART_SCALES = (0.5, 0.6, 0.7, 0.85, 1.0)
_FAR_SCALES = (0.7, 0.85, 1.0)  # coarser ones lose again what a composed start has found
_SMALLEST_SIDE = 32  # DIS refuses less than about 12 pixels, and the coarsest scale is a quarter
_UNGUIDED = 2.0  # grey levels by which search without a start must win over the one with it
_MATCHED, _RESTARTED = 0.5, 0.1  # grey levels by which block matching must win, raw and refined
_POLISHED = -0.3  # grey levels by which the last smoothing may lose: it lets cycles close
_NARROW = 1.0  # grey levels by which flow must win in a narrow window
_STRONG, _LIGHT = (5, 25), (3, 5)  # fixed-point and relaxation iterations


class DisFlow:
    """Flow by dense inverse search plus variational refinement (a `FlowProvider`).

    Sources: Kroeger et al., Fast Optical Flow using Dense Inverse Search, ECCV 2016; Brox et al.,
    High Accuracy Optical Flow Estimation Based on a Theory for Warping, ECCV 2004; for sharpening
    see `PhotoConsistency`.

    Args:
        refine: whether to refine and sharpen, which takes two thirds of the time.
        workers: number of `estimate` calls the caller may run at the same time.
    """

    batch = 1
    judges = False

    def __init__(self, refine: bool = True, workers: int = 1):
        self.name = "dis-wide" if refine else "dis"
        self.workers = workers
        self._refine = refine

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels from `image1` to `image2`, both `(h, w, 3)` uint8 RGB.

        Args:
            image1: source frame.
            image2: target frame.
            start: `(h, w, 2)` first guess in pixels for distant frames, None for adjacent ones.
        """
        height, width = image1.shape[:2]
        pad = max(0, _SMALLEST_SIDE - height), max(0, _SMALLEST_SIDE - width)
        images = _pad(image1, pad), _pad(image2, pad)
        grays = tuple(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images)
        likeness = PhotoConsistency(*images)
        found = _search(*grays)
        if start is None:
            flow, scales = found, _NEAR_SCALES
        else:
            start = _pad(start, pad)
            guided = _search(*grays, start.copy())
            flow = likeness.choose([start, guided, found], [0, 0, _UNGUIDED])
            scales = _FAR_SCALES
        if self._refine:
            smooth = tuple(map(_smooth, grays))
            flow = _refine(*smooth, flow, scales)
            if start is None:
                matched = likeness.choose([found, block_match(*images)], [0, _MATCHED])
                other = _refine(*smooth, likeness.spread(matched), _RESTART_SCALES)
                flow = likeness.choose([flow, other], [0, _RESTARTED])
            flow = likeness.spread(flow)
            polished = _solve(*smooth, flow, *_LIGHT)
            flow = likeness.choose([flow, polished], [0, _POLISHED])
            flow = likeness.narrowed(1).spread(flow, _NARROW)
        return np.ascontiguousarray(flow[:height, :width])

    def estimate_batch(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    ) -> list[Motion]:
        """Motion of each `(image1, image2, start)`, by `estimate`."""
        return [Motion(self.estimate(*pair)) for pair in pairs]


def _search(gray1, gray2, start=None):
    # A new object each time: after a guided search OpenCV's object keeps its start for the plain
    # ones that follow, and crashes when their size differs.
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)
    return _finite(search.calc(gray1, gray2, start))


def _refine(smooth1, smooth2, flow, scales):
    size = np.array(smooth1.shape[::-1])
    for scale in scales:
        level = tuple(np.rint(size * scale).astype(int).tolist())
        small1, small2 = (
            cv2.resize(image, level, interpolation=cv2.INTER_AREA) for image in (smooth1, smooth2)
        )
        flow = _solve(small1, small2, _resize_flow(flow, level), *_STRONG)
        flow = cv2.merge([cv2.medianBlur(channel, 3) for channel in cv2.split(flow)])
    return flow


def _smooth(gray):
    return cv2.GaussianBlur(gray.astype(np.float32) / 255, (0, 0), 0.6)


def _solve(smooth1, smooth2, flow, fixed_point, relaxation):
    """Variational refinement of `flow`, which it leaves as it is."""
    solver = cv2.VariationalRefinement_create()
    solver.setFixedPointIterations(fixed_point)
    solver.setSorIterations(relaxation)
    solver.setAlpha(3)
    solver.setDelta(0.5)
    solver.setGamma(5)
    solver.setOmega(1.6)
    return _finite(solver.calc(smooth1, smooth2, flow.copy()))


def _resize_flow(flow, level):
    """A copy of `flow` at the size `level` (w, h), with its lengths scaled along."""
    size = flow.shape[1::-1]
    if size == level:
        return flow.copy()
    method = cv2.INTER_AREA if level[0] < size[0] else cv2.INTER_LINEAR
    ratio = (np.array(level) / np.array(size)).astype(np.float32)
    return cv2.resize(flow, level, interpolation=method) * ratio


def _pad(array, pad):
    if pad == (0, 0):
        return array
    return cv2.copyMakeBorder(array, 0, pad[0], 0, pad[1], cv2.BORDER_REPLICATE)


def _finite(flow):
    return np.nan_to_num(flow, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
