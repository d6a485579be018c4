"""How far a flow can be trusted, from its agreement with the reverse flow. Pure functions.

Flows are `(h, w, 2)` float32 pixels; `forward` runs i -> j, `backward` j -> i.
"""

import cv2
import numpy as np

from omni.maths import Evidence, inside, pixel_centers, unpack_evidence
from omni.store import UNKNOWN
from preprocess.flow import compose, sample

__all__ = [
    "assess",
    "cycle_errors",
    "gap_statistics",
    "labels_agree",
]

_OCCLUDED_FACTOR = 1.5  # times the threshold: the least error of an occluded point


def assess(
    forward: np.ndarray,
    backward: np.ndarray,
    threshold: float,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
) -> Evidence[np.ndarray]:
    """Results of the consistency checks for each pixel `(h, w)` of `forward`.

    Args:
        forward: `(h, w, 2)` flow i -> j.
        backward: `(h, w, 2)` flow j -> i.
        threshold: forward-backward error in pixels up to which a correspondence is reliable.
        labels: masks `(h, w)` uint8 of frames i and j, None without masks.

    Source: OmniMotion (Wang et al., ICCV 2023), supplement: cycle and double-cycle tests.
    """
    error, second = cycle_errors(forward, backward)
    valid = inside(pixel_centers(forward.shape[:2]) + forward, forward.shape[:2])
    occluded = (error > _OCCLUDED_FACTOR * threshold) & (second < threshold) & valid
    if labels is not None:
        valid = valid & labels_agree(forward, *labels)
    return Evidence(error, occluded, valid)


def cycle_errors(forward: np.ndarray, backward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors `(h, w)` of the cycle and of the double cycle, pixels.

    Returns:
        The distance between a point and its image after i -> j -> i, and the distance in j between
        the targets of i -> j and of i -> j -> i -> j. The second one is small for a point that its
        occluder hides in j, too: the occluder's own motion is consistent.
    """
    back = compose(forward, backward)
    return _length(back), _length(compose(back, forward) - forward)


def _length(flow: np.ndarray) -> np.ndarray:
    """`(h, w)` pixels, to the bit what `np.linalg.norm` gives in a tenth of its time."""
    x, y = flow[..., 0], flow[..., 1]
    return np.sqrt(x * x + y * y)


def labels_agree(flow: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`(h, w)` bool: label where a pixel starts equals label where it lands, or one is unknown.

    Args:
        flow: `(h, w, 2)` pixels.
        source: `(h, w)` uint8 labels of the source frame.
        target: `(h, w)` uint8 labels of the target frame.
    """
    landed = sample(target, flow, cv2.INTER_NEAREST)
    return (landed == source) | (landed == UNKNOWN) | (source == UNKNOWN)


def gap_statistics(evidence: np.ndarray, pairs: np.ndarray, threshold: float) -> list[dict]:
    """Per gap: shares of reliable and occluded pixels, median forward-backward error.

    Args:
        evidence: `(K, h, w)` uint8 as packed in the store.
        pairs: `(K, 2)`.
        threshold: pixels up to which a valid correspondence counts as reliable.
    """
    gaps = np.abs(pairs[:, 1] - pairs[:, 0])
    meaning = unpack_evidence(np.arange(256, dtype=np.uint8))
    statistics = []
    for gap in np.unique(gaps):
        counts = np.zeros(256, np.int64)
        for k in np.flatnonzero(gaps == gap):
            counts += np.bincount(evidence[k].ravel(), minlength=256)
        reliable = meaning.valid & (meaning.error <= threshold)
        statistics.append(
            {
                "gap": int(gap),
                "reliable": float(counts[reliable].sum() / counts.sum()),
                "occluded": float(counts[meaning.occluded].sum() / counts.sum()),
                "median_error": _weighted_median(meaning.error, counts * meaning.valid),
            }
        )
    return statistics


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> float:
    """Median of `values` (N,) that occur `counts` (N,) times each; 0 if there are none."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(counts[order])
    middle = np.searchsorted(total, total[-1] / 2)
    return float(values[order][middle]) if total[-1] else 0.0
