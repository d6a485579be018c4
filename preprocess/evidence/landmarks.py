"""Sparse matches between distant frames, to recover points after gaps that no flow bridges.

Classical features need no weights: SIFT, mutual nearest neighbours, Lowe's ratio test. Only key
frames are matched, so that the number of pairs does not grow with the square of the video's
length.
"""

from collections.abc import Sequence

import cv2
import numpy as np

__all__ = ["MATCHES", "find_features", "key_pairs", "match"]

KEY_STRIDE = 8
"""Frames between key frames, more in long videos."""
MOST_KEYS = 24
"""Most key frames, about."""
MATCHES = 512
"""Most matches kept of one pair of frames."""
_FEATURES = 2000  # most of one frame
_RATIO = 0.8  # of the distances to the nearest and the second nearest descriptor

Features = tuple[np.ndarray, np.ndarray]
"""Raster positions (n, 2) and descriptors (n, 128)."""


def key_pairs(num_frames: int, cuts: Sequence[int] = ()) -> np.ndarray:
    """Pairs `(P, 2)` int64 of key frames, source before target, none across a cut."""
    stride = max(KEY_STRIDE, -(-num_frames // MOST_KEYS))
    keys = np.arange(0, num_frames, stride)
    shot = np.searchsorted(np.sort(np.asarray(cuts, np.int64)), keys, "right")
    first, second = np.triu_indices(len(keys), 1)
    same = shot[first] == shot[second]
    return np.stack([keys[first[same]], keys[second[same]]], axis=1)


def find_features(image: np.ndarray) -> Features:
    """SIFT features of an `(h, w, 3)` uint8 image.

    Source: Lowe, Distinctive Image Features from Scale-Invariant Keypoints, IJCV 2004.
    """
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    detector = cv2.SIFT.create(_FEATURES, contrastThreshold=0.02)
    points, descriptors = detector.detectAndCompute(gray, None)
    if not points:
        return np.empty((0, 2), np.float32), np.empty((0, 128), np.float32)
    # OpenCV counts from pixel centres.
    positions = np.array([point.pt for point in points], np.float32) + np.float32(0.5)
    return positions, descriptors


def match(first: Features, second: Features) -> np.ndarray:
    """Mutual nearest neighbours that pass Lowe's ratio test, best first.

    Args:
        first: features of the first frame.
        second: features of the second frame.

    Returns:
        `(MATCHES, 4)` float32 x, y in the first and x, y in the second frame; NaN where unused.
    """
    result = np.full((MATCHES, 4), np.nan, np.float32)
    (xy1, descriptors1), (xy2, descriptors2) = first, second
    if len(xy1) < 2 or len(xy2) < 2:
        return result
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    forward = matcher.knnMatch(descriptors1, descriptors2, 2)
    backward = matcher.knnMatch(descriptors2, descriptors1, 1)
    found = [
        (best.distance / max(other.distance, 1e-6), best.queryIdx, best.trainIdx)
        for best, other in forward
        if backward[best.trainIdx][0].trainIdx == best.queryIdx
    ]
    kept = sorted(entry for entry in found if entry[0] < _RATIO)[:MATCHES]
    for row, (_, i, j) in enumerate(kept):
        result[row] = *xy1[i], *xy2[j]
    return result
