"""Standard deviation of flow: calibrated per provider and gap, corrected for the video at hand.

The standard deviation of a flow over `gap` frames is `floor + slope * forward-backward error`,
pixels of the processing resolution per axis. Floor and slope are data, `sigma.json` beside
this module, fitted to exact ground truth by `scripts/calibrate.py`. A video may be harder or easier
than the clips they were fitted on, which cycles show without ground truth: a flow over 2g frames
against two flows over g. Their residual in units of the predicted sigma, relative to that on the
calibration clips, is the correction:

    factor = median residual / median residual on the calibration clips, within [1/2, 2]
    floor = factor * calibrated floor + NOISE        slope = factor * calibrated slope

The store keeps `[floor, slope]` per gap in the notes of its evidence; `omni.tracking.links` and
the batches of `omni.field.sampling` apply them to the error at a point.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from omni.maths import decode_flow, pixel_centers, unpack_evidence
from omni.store import Store
from preprocess.flow import compose

__all__ = ["calibrated", "corrected", "cycle_residuals", "reload_sigma"]

LARGEST = 2.0
"""A video's correction lies between 1 / LARGEST and LARGEST."""

NOISE = 0.15
"""Pixels added to every floor: the clips of the calibration have no sensor noise."""

FALLBACK_PROVIDER = "dis-wide"
"""The provider whose numbers are used for one that is not calibrated."""

_STRIDE = 5  # pixels between the points at which cycles are closed
_SAMPLES = 12  # cycles per gap: enough for a median
_PATH = Path(__file__).with_name("sigma.json")


def calibrated(provider: str, gaps: list[int]) -> dict[int, list[float]]:
    """`[floor, slope, cycle]` of a provider by gap; of the nearest calibrated gap on a log scale.

    `cycle` is the median cycle residual in units of sigma on the calibration clips, 0 if unknown.
    """
    table = _table()
    known = {int(gap): line for gap, line in table.get(provider, table[FALLBACK_PROVIDER]).items()}
    return {g: known[min(known, key=lambda k: abs(np.log2(k / g)))] for g in gaps}


def corrected(store: Store, evidence: np.ndarray, threshold: float) -> dict[int, list[float]]:
    """`[floor, slope]` by gap for this video: the provider's, scaled by its cycle residuals.

    Args:
        store: finished flows.
        evidence: (K, h, w) uint8 of the flows, packed.
        threshold: forward-backward error in pixels up to which a flow is used.
    """
    gaps = np.unique(np.abs(np.diff(store.pairs, axis=1))).tolist()
    lines = calibrated(store.meta("flow")["provider"], gaps)
    factors = {}
    for gap in gaps:
        residuals = cycle_residuals(store, evidence, threshold, gap, lines)
        expected = lines[gap][2]
        if len(residuals) >= 200 and expected > 0:
            ratio = float(np.median(residuals)) / expected
            factors[gap] = float(np.clip(ratio, 1 / LARGEST, LARGEST))
    # A gap without cycles of its own takes the factor of the nearest one that has some.
    for gap in gaps:
        near = min(factors, key=lambda k: abs(np.log2(k / gap)), default=None)
        factor = 1.0 if near is None else factors[near]
        floor, slope, _ = lines[gap]
        lines[gap] = [round(factor * floor + NOISE, 4), round(factor * slope, 4)]
    return lines


def cycle_residuals(
    store: Store, evidence: np.ndarray, threshold: float, gap: int, lines: dict[int, list[float]]
) -> np.ndarray:
    """Residuals (N,) of flows over `gap` frames against two of half the gap, in units of sigma.

    Args:
        store: finished flows.
        evidence: (K, h, w) uint8 of the flows, packed.
        threshold: forward-backward error in pixels up to which a flow is used.
        gap: frames; an odd one has no cycles.
        lines: floor and slope by gap.
    """
    parts = [np.empty(0, np.float32)]
    for whole, first, second in _cycles(store.pairs, gap):
        flows = [decode_flow(store.flow[k]) for k in (whole, first, second)]
        residual = np.linalg.norm(flows[0] - compose(flows[1], flows[2]), axis=-1)
        errors = [unpack_evidence(evidence[k]) for k in (whole, first, second)]
        landing = _landing(flows[1])
        valid = errors[0].valid & errors[1].valid & errors[2].valid[landing]
        error = (errors[0].error, errors[1].error, errors[2].error[landing])
        good = valid & (np.maximum.reduce(error) <= threshold)
        half = gap // 2
        sigma = [
            lines[g][0] + lines[g][1] * e for g, e in zip((gap, half, half), error, strict=True)
        ]
        total = np.sqrt(sum(np.square(value) for value in sigma))
        chosen = (slice(None, None, _STRIDE),) * 2
        parts.append((residual / total)[chosen][good[chosen]].astype(np.float32))
    return np.concatenate(parts)


def _cycles(pairs: np.ndarray, gap: int) -> Iterator[tuple[int, int, int]]:
    """Indices of a flow over `gap` frames and of the two over half of it, evenly spaced."""
    if gap % 2:
        return
    index = {tuple(pair): k for k, pair in enumerate(pairs.tolist())}
    whole = [p for p in index if p[1] - p[0] == gap and (p[0], p[0] + gap // 2) in index]
    for i in np.unique(np.linspace(0, len(whole) - 1, min(len(whole), _SAMPLES)).astype(int)):
        source, target = whole[i]
        middle = source + gap // 2
        yield index[source, target], index[source, middle], index[middle, target]


def _landing(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels in which a flow lands, at the border where it leaves."""
    height, width = flow.shape[:2]
    there = (pixel_centers((height, width)) + flow).astype(np.int64)
    return there[..., 1].clip(0, height - 1), there[..., 0].clip(0, width - 1)


def reload_sigma() -> None:
    """Read the calibration again, after it was written anew."""
    _table.cache_clear()


@cache
def _table() -> dict[str, dict[str, list[float]]]:
    return json.loads(_PATH.read_text(encoding="utf-8"))["providers"]
