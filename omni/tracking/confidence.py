"""Predicted confidence of chains: visibility, trust and standard deviation from scale-free cues.

Three linear models share the cues of every point and frame: P(visible), the probability shown to
users; the trust P(visible and within 6 px), whose threshold decides the `visible` flag, since
Average Jaccard counts a visible but wrong point twice; and log sigma. Their coefficients and the
threshold are data, `omni/tracking/calibration.json`, fitted on generated clips by
`scripts/calibrate.py`. Once a field is fitted, the network of `omni.tracking.selection` predicts
the same three quantities instead.

Letters: N points, T frames, F cues.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.ndimage import median_filter

from omni.tracking.integration import LOOSE, STRICT, UNVERIFIED, Chains

__all__ = ["CUES", "Confidence", "cues", "frames_away", "median_filtered", "predict_confidence"]

CUES = (
    "one strict loose log_sigma log_error agree log_away log_age strict_share zncc strict_zncc "
    "log_tint covered log_stretch"
).split()
"""Names of the cues, as `calibration.json` lists them: `agree` is the number of fused candidates,
`covered` the share of links whose double cycle detects an occlusion."""

FLICKER = 3
"""Frames of the median filter on the trust: no flag changes for a single frame."""

_LARGEST = 20.0  # pixels at a short side of 256; sigma and error of a lost state
_PATH = Path(__file__).with_name("calibration.json")


@dataclass
class Confidence:
    """Predicted confidence of N points in T frames.

    Attributes:
        visibility: (N, T) float32 probability that the point is visible.
        sigma: (N, T) float32 standard deviation per axis, processing pixels.
        visible: (N, T) bool.
    """

    visibility: np.ndarray
    sigma: np.ndarray
    visible: np.ndarray

    @classmethod
    def joined(cls, parts: list["Confidence"]) -> "Confidence":
        """That of the points of all parts."""
        values = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(each) for each in values))


def cues(
    chains: Chains,
    query_frames: np.ndarray,
    short_side: int,
    similarity: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Cues `(N, T, F)` float32 in the order of CUES.

    Lengths are measured at a short side of 256 pixels, so that cues do not depend on the size.

    Args:
        chains: integrated flows.
        query_frames: (N,).
        short_side: of the processing size, pixels.
        similarity: patch correlation and colour distance, (N, T) each: see
            `omni.tracking.appearance.similarity`.
    """
    scale = 256 / short_side
    level = chains.level.T
    strict, loose, lost = level == STRICT, level == LOOSE, level <= UNVERIFIED
    sigma = np.where(lost, _LARGEST, np.minimum(chains.sigma.T * scale, _LARGEST))
    error = np.where(lost, _LARGEST, np.minimum(chains.error.T * scale, _LARGEST))
    times = np.arange(level.shape[1])
    correlation, color_distance = similarity
    values = [
        np.ones_like(sigma),
        strict,
        loose,
        np.log(sigma + 0.1),
        np.log(error + 0.1),
        np.minimum(chains.num_fused.T, 6) / 6,
        np.log1p(np.minimum(frames_away(strict), 30)),
        np.log1p(np.abs(times - query_frames[:, None])),
        np.broadcast_to(strict.mean(1, keepdims=True), strict.shape),
        correlation,
        strict * correlation,
        np.log(color_distance + 2),
        chains.occluded.T,
        np.log(np.clip(chains.stretch.T, 1, 8)),
    ]
    return np.stack([np.asarray(value, np.float32) for value in values], axis=-1)


def frames_away(known: np.ndarray) -> np.ndarray:
    """Frames `(N, T)` from each entry of `(N, T)` bool to the nearest True one of its row."""
    times, never = np.arange(known.shape[1]), 10**6
    before = np.maximum.accumulate(np.where(known, times, -never), axis=1)
    after = np.minimum.accumulate(np.where(known, times, never)[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(times - before, after - times)


def predict_confidence(values: np.ndarray, short_side: int) -> Confidence:
    """Apply the calibrated models to `cues` `(N, T, F)`; `short_side` of the processing size."""
    weights = _calibration()
    visibility, trust, log_sigma = (
        values @ np.asarray(weights[name], np.float32)
        for name in ("visibility", "trust", "log_sigma")
    )
    sigma = np.exp(np.clip(log_sigma, np.log(0.05), np.log(128.0))) * (short_side / 256)
    return Confidence(
        _logistic(visibility), sigma, median_filtered(_logistic(trust)) > weights["threshold"]
    )


def median_filtered(trust: np.ndarray) -> np.ndarray:
    """Median over FLICKER frames of `(N, T)` probabilities: removes single-frame changes."""
    return median_filter(trust, (1, FLICKER), mode="nearest")


@cache
def _calibration() -> dict:
    return json.loads(_PATH.read_text(encoding="utf-8"))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))
