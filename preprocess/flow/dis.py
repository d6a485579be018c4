"""Dense flow without any weights: OpenCV's DIS, refined, then sharpened at motion borders.

The constants were selected by measurement (docs/experiments.md). Refinement fills textureless
areas, block matching finds small objects that move far, sharpening takes back what refinement
smears across borders, composed initial flows make far flows usable. The flow of a learned method
may be one more start: it finds motion that all of these miss, less exactly where they find it.
"""

from collections.abc import Sequence
from threading import Lock

import cv2
import numpy as np

from preprocess.flow.blockmatch import block_match
from preprocess.flow.frame import Frame
from preprocess.flow.photoconsistency import PhotoConsistency
from preprocess.flow.provider import FlowProvider, ImagePair

__all__ = ["DisFlow"]

Size = tuple[int, int]

_NEAR_SCALES = (0.25, 0.31, 0.38, 0.46, 0.57, 0.7, 0.85, 1.0)
_RESTART_SCALES = (0.5, 0.6, 0.7, 0.85, 1.0)
_FAR_SCALES = (0.7, 0.85, 1.0)  # coarser ones would discard details of a composed initial flow
_SMALLEST_SIDE = 32  # DIS refuses less than about 12 pixels, and the coarsest scale is a quarter
_STRONG, _LIGHT = (5, 25), (3, 5)  # fixed-point and relaxation iterations

# Grey levels of photo-consistency cost by which a later candidate must win over the earlier ones.
_UNGUIDED = 2.0  # search without the initial flow, over search with it
_MATCHED, _RESTARTED = 0.5, 0.1  # block matching over search, as found and after refinement
_POLISHED = -0.3  # last smoothing: it may even be worse, for it makes flow cycle consistent
_NARROW = 1.0  # flow propagated in narrow windows
_LEARNED = -2.0  # flow of a learned method: its errors are rarer than wrong flow that looks right


class DisFlow:
    """Flow by dense inverse search plus variational refinement (a `FlowProvider`).

    Sources: Kroeger et al., Fast Optical Flow using Dense Inverse Search, ECCV 2016; Brox et al.,
    High Accuracy Optical Flow Estimation Based on a Theory for Warping, ECCV 2004; for sharpening
    see `PhotoConsistency`.

    Args:
        workers: number of `estimate` calls the caller may run at the same time.
        learned: a method whose flow is one more start.
    """

    name = "dis-wide"
    batch = 1

    def __init__(self, workers: int = 1, learned: FlowProvider | None = None):
        self.workers, self._learned, self._turn = workers, learned, Lock()
        if learned is not None:
            self.name = f"mixed-{learned.name}"

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, flow_init: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels from `image1` to `image2`, both `(h, w, 3)` uint8 RGB.

        Args:
            image1: source frame.
            image2: target frame.
            flow_init: `(h, w, 2)` initial flow in pixels for distant frames, None for adjacent
                ones.
        """
        height, width = image1.shape[:2]
        pad = max(0, _SMALLEST_SIDE - height), max(0, _SMALLEST_SIDE - width)
        source, target = frames = [Frame(_pad(image, pad)) for image in (image1, image2)]
        consistency = PhotoConsistency(source, target)
        learned = self._learned_flow(image1, image2, pad)
        cost = [_LEARNED] * len(learned)
        found = _search(source.gray, target.gray)
        if flow_init is None:
            flow = _refine(frames, found, _NEAR_SCALES)
            matched = block_match(source.image, target.image)
            matched = consistency.choose([found, matched], [0, _MATCHED])
            matched = consistency.propagate(matched)
            restarted = _refine(frames, matched, _RESTART_SCALES)
            # Before it is refined, one that is a pixel or two off would lose to any wrong flow.
            learned = [_refine(frames, start, _RESTART_SCALES) for start in learned]
            flow = consistency.choose([flow, restarted, *learned], [0, _RESTARTED, *cost])
        else:
            flow_init = _pad(flow_init, pad)
            guided = _search(source.gray, target.gray, flow_init.copy())
            starts = [flow_init, guided, found, *learned]
            flow = consistency.choose(starts, [0, 0, _UNGUIDED, *cost])
            flow = _refine(frames, flow, _FAR_SCALES)
        flow = _sharpen(frames, flow, consistency)
        return np.ascontiguousarray(flow[:height, :width])

    def estimate_batch(self, pairs: Sequence[ImagePair]) -> list[np.ndarray]:
        """Flow of each `(image1, image2, flow_init)`, by `estimate`."""
        return [self.estimate(*pair) for pair in pairs]

    def _learned_flow(self, image1: np.ndarray, image2: np.ndarray, pad: Size) -> list[np.ndarray]:
        """The learned method's flow, padded; empty without one."""
        if self._learned is None:
            return []
        with self._turn:  # one pair at a time, which uses all cores by itself
            return [_pad(self._learned.estimate(image1, image2), pad)]


def _search(
    gray1: np.ndarray, gray2: np.ndarray, flow_init: np.ndarray | None = None
) -> np.ndarray:
    """Flow `(h, w, 2)` by dense inverse search, which overwrites `flow_init`."""
    # A new object each time: after a guided search OpenCV's object keeps its initial flow for the
    # plain ones that follow, and crashes when their size differs.
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)
    # OpenCV takes None, against its stubs.
    return _finite(search.calc(gray1, gray2, flow_init))  # type: ignore[arg-type]


def _refine(frames: Sequence[Frame], flow: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    """Flow refined from coarse to fine `scales`; median filters remove its outliers."""
    size = np.array(frames[0].size)
    for scale in scales:
        width, height = np.rint(size * scale).astype(int).tolist()
        level = (width, height)
        flow = _solve(frames, level, _resize_flow(flow, level), *_STRONG)
        flow = cv2.merge([cv2.medianBlur(channel, 3) for channel in cv2.split(flow)])
    return flow


def _sharpen(
    frames: Sequence[Frame], flow: np.ndarray, consistency: PhotoConsistency
) -> np.ndarray:
    """Flow with motion borders back at image edges, and smooth between them."""
    flow = consistency.propagate(flow)
    polished = _solve(frames, frames[0].size, flow.copy(), *_LIGHT)
    flow = consistency.choose([flow, polished], [0, _POLISHED])
    return consistency.with_radius(1).propagate(flow, _NARROW)


def _solve(
    frames: Sequence[Frame], level: Size, flow: np.ndarray, fixed_point: int, relaxation: int
) -> np.ndarray:
    """Variational refinement of `flow` at the size `level` (w, h), which it overwrites."""
    solver = cv2.VariationalRefinement.create()
    solver.setFixedPointIterations(fixed_point)
    solver.setSorIterations(relaxation)
    solver.setAlpha(3)
    solver.setDelta(0.5)
    solver.setGamma(5)
    solver.setOmega(1.6)
    smooth1, smooth2 = (frame.smooth(level) for frame in frames)
    return _finite(solver.calc(smooth1, smooth2, flow))


def _resize_flow(flow: np.ndarray, level: Size) -> np.ndarray:
    """A copy of `flow` at the size `level` (w, h), with its lengths scaled along."""
    size = flow.shape[1::-1]
    if size == level:
        return flow.copy()
    method = cv2.INTER_AREA if level[0] < size[0] else cv2.INTER_LINEAR
    resized = cv2.resize(flow, level, interpolation=method)
    for axis in (0, 1):
        part = resized[..., axis]
        np.multiply(part, np.float32(level[axis] / size[axis]), out=part)
    return resized


def _pad(array: np.ndarray, pad: Size) -> np.ndarray:
    """`array` with `pad` (rows, columns) of replicated border added below and to the right."""
    if pad == (0, 0):
        return array
    return cv2.copyMakeBorder(array, 0, pad[0], 0, pad[1], cv2.BORDER_REPLICATE)


def _finite(flow: np.ndarray) -> np.ndarray:
    if np.isfinite(flow).all():
        return flow
    return np.nan_to_num(flow, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
