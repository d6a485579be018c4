"""Hard cuts: where a video jumps to another shot, so that no flow should be computed across.

Neighbouring frames are compared after motion compensation, so that fast motion does not count,
and up to brightness and contrast, so that fades and flicker do not. On 16 continuous clips
neighbours differed by at most 0.13; frames of different clips by at least 0.46.
"""

import cv2
import numpy as np

from omni.system import single_threaded_opencv
from preprocess.flow import sample

__all__ = ["find_cuts"]

_DIFFERENT = 0.35  # dissimilarity that a cut exceeds
_SPIKE = 4.0  # times by which it exceeds the median of its surroundings
_SURROUNDINGS = 8  # frames on either side that make the median
_CONTEXT = 3  # frames on either side that must all differ: after a flash the old shot returns
_SHORTEST_SHOT = 2  # frames; a single one would be indistinguishable from a flash
_SIZE = (96, 64)  # width and height at which frames are compared, whatever their shape
_NOISE = 50.0  # variance (grey levels squared) below which contrast is not significant


@single_threaded_opencv()
def find_cuts(frames: np.ndarray) -> list[int]:
    """First frames of new shots (the first shot left out), of `(T, h, w, 3)` uint8 frames."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    small = [cv2.resize(frame, _SIZE, interpolation=cv2.INTER_AREA) for frame in frames]
    count = len(small)
    step = np.array([_dissimilarity(search, *small[t - 1 : t + 1]) for t in range(1, count)])
    cuts: list[int] = []
    for t in range(_SHORTEST_SHOT, count - _SHORTEST_SHOT + 1):
        around = np.delete(step, t - 1)[max(0, t - 1 - _SURROUNDINGS) : t - 1 + _SURROUNDINGS]
        spike = step[t - 1] > max(_DIFFERENT, _SPIKE * np.median(around))
        long_enough = not cuts or t - cuts[-1] >= _SHORTEST_SHOT
        if spike and long_enough and _stays_different(search, small, t):
            cuts.append(t)
    return cuts


def _stays_different(search: cv2.DISOpticalFlow, small: list[np.ndarray], t: int) -> bool:
    """Whether no frame shortly before `t` returns in the frames from `t` on."""
    before, after = small[max(0, t - _CONTEXT) : t], small[t : t + _CONTEXT]
    return all(_dissimilarity(search, a, b) > _DIFFERENT for a in before for b in after)


def _dissimilarity(search: cv2.DISOpticalFlow, first: np.ndarray, second: np.ndarray) -> float:
    """1 - correlation of two small frames (contrast-invariant), after motion compensation."""
    gray1, gray2 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second))
    # OpenCV takes None, against its stubs.
    found = search.calc(gray1, gray2, None)  # type: ignore[call-overload]
    flow = np.nan_to_num(found)
    warped = sample(second, flow)
    a, b = (image - image.mean((0, 1)) for image in (first.astype(np.float32), warped))
    variances = ((a * a).mean() + _NOISE) * ((b * b).mean() + _NOISE)
    return 1 - ((a * b).mean() + _NOISE) / np.sqrt(variances)
