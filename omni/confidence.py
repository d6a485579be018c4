"""How sure we are: visibility, trust and standard deviation from scale-free cues.

For chains alone three small models share the cues of every point and frame: P(visible), the
probability shown to users; P(visible and within 6 px), whose threshold decides the `visible` flag,
since Average Jaccard charges a visible-but-wrong point twice; and log sigma. Their coefficients and
threshold are data, `omni/calibration.json`, fitted on generated clips by `scripts/calibrate.py`.
With a field `omni.consensus` judges, in the same three terms.

Letters: N points, T frames, F cues.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.ndimage import median_filter

from omni.integration import GUESSED, LOOSE, STRICT, Chains

__all__ = ["CUES", "Judgement", "cues", "frames_away", "judge", "steady"]

CUES = (
    "one strict loose log_sigma log_error agree log_away log_age strict_share zncc strict_zncc "
    "log_tint covered log_stretch"
).split()

FLICKER = 3
"""Frames over which the median of P(visible and near) decides: a flag does not change for one."""

_FAR = 20.0
_PATH = Path(__file__).with_name("calibration.json")


@dataclass
class Judgement:
    """visibility, sigma: (N, T) float32; visible: (N, T) bool. Sigma in processing pixels."""

    visibility: np.ndarray
    sigma: np.ndarray
    visible: np.ndarray


def cues(
    chains: Chains,
    query_frames: np.ndarray,
    short_side: int,
    similarity: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Cues `(N, T, F)` in the order of CUES.

    Lengths are counted at a short side of 256 pixels, so that they mean the same at any size.

    Args:
        chains: integrated flows.
        query_frames: (N,).
        short_side: of the processing size, pixels.
        similarity: correlation and colour distance (N, T), see `omni.appearance`.
    """
    scale = 256 / short_side
    level = chains.level.T
    strict, loose, lost = level == STRICT, level == LOOSE, level <= GUESSED
    sigma = np.where(lost, _FAR, np.minimum(chains.sigma.T * scale, _FAR))
    error = np.where(lost, _FAR, np.minimum(chains.error.T * scale, _FAR))
    times = np.arange(level.shape[1])
    zncc, tint = similarity
    values = [
        np.ones_like(sigma),
        strict,
        loose,
        np.log(sigma + 0.1),
        np.log(error + 0.1),
        np.minimum(chains.agree.T, 6) / 6,
        np.log1p(np.minimum(frames_away(strict), 30)),
        np.log1p(np.abs(times - query_frames[:, None])),
        np.broadcast_to(strict.mean(1, keepdims=True), strict.shape),
        zncc,
        strict * zncc,
        np.log(tint + 2),
        chains.covered.T,
        np.log(np.clip(chains.stretch.T, 1, 8)),
    ]
    return np.stack([np.asarray(value, np.float32) for value in values], axis=-1)


def frames_away(known: np.ndarray) -> np.ndarray:
    """Frames from each entry of `(N, T)` to the nearest known one of its row."""
    times, never = np.arange(known.shape[1]), 10**6
    before = np.maximum.accumulate(np.where(known, times, -never), axis=1)
    after = np.minimum.accumulate(np.where(known, times, never)[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(times - before, after - times)


def judge(values: np.ndarray, short_side: int) -> Judgement:
    """Apply the calibrated models to `cues`."""
    weights = _calibration()
    visibility, trust, log_sigma = (
        values @ np.asarray(weights[name], np.float32)
        for name in ("visibility", "trust", "log_sigma")
    )
    sigma = np.exp(np.clip(log_sigma, np.log(0.05), np.log(128.0))) * (short_side / 256)
    return Judgement(_logistic(visibility), sigma, steady(_logistic(trust)) > weights["threshold"])


def steady(trust: np.ndarray) -> np.ndarray:
    """Median over FLICKER frames of `(N, T)` probabilities."""
    return median_filter(trust, (1, FLICKER), mode="nearest")


@cache
def _calibration() -> dict:
    return json.loads(_PATH.read_text(encoding="utf-8"))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))
