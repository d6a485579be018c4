"""How good tracks are: the TAP-Vid, OmniMotion and BADJA metrics, and calibration.

Letters: N queries, T frames. Every share is a fraction in [0, 1]; what is undefined (nothing to
average) is None, never NaN. The arguments shared by the metrics:

    predicted, true        (N, T, 2) x, y, both in the units that the metric's distance is in
    predicted_visible      (N, T) bool
    visible                (N, T) bool, the truth
    scored                 (N, T) bool, entries that count: `scored_frames` and annotated

Sources: TAP-Vid (Doersch et al. 2022, section 3.2 and its reference code), OmniMotion (Wang et
al. 2023) for temporal coherence, BADJA (Biggs et al. 2018) as evaluated by PIPs for delta_seg.
"""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from omni.errors import OmniError
from omni.evaluation.truth import Truth
from omni.maths import rescale
from omni.tracking import Tracks

__all__ = [
    "DISTANCES",
    "Mode",
    "delta",
    "evaluate",
    "format_scores",
    "jaccard",
    "occlusion_accuracy",
    "queries",
    "scored_frames",
    "segment_delta",
    "sigma_calibration",
    "tap_vid",
    "temporal_coherence",
    "visibility_calibration",
]

Mode = Literal["first", "strided", "given"]
"""first: one query per track at its first visible frame, later frames count. strided: a query at
every fifth frame where a track is visible, all other frames count. given: the truth's own
queries, all other frames count."""

DISTANCES = (1, 2, 4, 8, 16)
"""TAP-Vid's thresholds, pixels at 256 x 256."""

_SCALE = (256, 256)
_STRIDE = 5
_BINS = 10
_TOLERANCE = 0.02


def evaluate(prediction: Tracks, truth: Truth, mode: Mode) -> dict[str, Any]:
    """Every metric that the truth allows, as a JSON-safe dict.

    AJ, delta_avg, OA, TC, delta_D and jaccard_D for D in `DISTANCES` are taken at 256 x 256 scale
    whatever the resolution; delta_3px and delta_seg at the truth's own. Joint annotations (a
    truth with `mask_area`) are no reliable source of visibility: AJ, jaccard, OA and visibility
    calibration are None for them.

    Args:
        prediction: tracks of exactly the queries of `queries(truth, mode)`, in their order.
        truth: as read from the file; turned into queries here.
        mode: which queries and frames count, see `Mode`.

    Returns:
        The metrics named above, `sigma` (see `sigma_calibration`), `visibility` (see
        `visibility_calibration`), `mode`, `queries` N and `scored` the number of entries.

    Raises:
        OmniError: unknown mode, other queries or frames, positions that are not finite.
    """
    truth = queries(truth, mode)
    _check(prediction, truth, mode)
    scored = scored_frames(truth.query_points, truth.tracks.shape[1], mode) & truth.annotated
    native = rescale(prediction.tracks.astype(np.float64), prediction.size, truth.size)
    true = truth.tracks.astype(np.float64)
    small, small_true = (rescale(xy, truth.size, _SCALE) for xy in (native, true))
    result: dict[str, Any] = {"mode": mode, "queries": len(true), "scored": int(scored.sum())}
    result |= tap_vid(small, prediction.visible, small_true, truth.visible, scored)
    result["TC"] = temporal_coherence(small, small_true, truth.known)
    result["delta_3px"] = delta(native, true, truth.visible, scored, 3.0)
    result["delta_seg"] = segment_delta(native, true, truth.visible, scored, truth.mask_area)
    own = rescale(true, truth.size, prediction.size)
    result["sigma"] = sigma_calibration(
        prediction.tracks, prediction.sigma, own, scored & truth.visible
    )
    result["visibility"] = visibility_calibration(prediction.visibility, truth.visible, scored)
    if truth.mask_area is not None:
        unscored = ["AJ", "OA", "visibility", *(f"jaccard_{d}" for d in DISTANCES)]
        result |= dict.fromkeys(unscored)
    return result


def queries(truth: Truth, mode: Mode) -> Truth:
    """Turn the truth into one row per query of `mode`; its `query_points` are what to track.

    Raises:
        OmniError: unknown mode.

    Source: TAP-Vid's sample_queries_first and sample_queries_strided.
    """
    if mode not in get_args(Mode):
        raise OmniError(f"query mode {mode!r} is unknown: use one of {', '.join(get_args(Mode))}")
    if mode == "given":
        return truth
    if mode == "first":
        row = np.flatnonzero(truth.known.any(axis=1))
        frame = truth.known[row].argmax(axis=1)
    else:
        index, row = np.nonzero(truth.known[:, ::_STRIDE].T)
        frame = index * _STRIDE
    xy = truth.tracks[row, frame]
    return dataclasses.replace(
        truth,
        tracks=truth.tracks[row],
        visible=truth.visible[row],
        annotated=truth.annotated[row],
        query_points=np.column_stack([frame, xy[:, 1], xy[:, 0]]).astype(np.float32),
    )


def format_scores(scores: dict[str, Any]) -> str:
    """Lay out what `evaluate` returns as a table to read; shares in percent, TC in pixels."""
    names = ("AJ", "delta_avg", "OA", "TC", "delta_seg", "delta_3px")
    values: list[float | str | None] = [_percent(scores[name]) for name in names]
    values[3] = _text(scores["TC"], 2)
    rows: list[list[float | str | None]] = [
        ["", *names],
        ["", *values],
        ["within px", *DISTANCES],
    ]
    for part in ("delta", "jaccard"):
        rows.append([part, *(_percent(scores[f"{part}_{d}"]) for d in DISTANCES)])
    lines = [f"mode {scores['mode']}: {scores['queries']} queries, {scores['scored']} entries"]
    lines += ["".join(f"{_text(cell):>11}" for cell in row).rstrip() for row in rows]
    sigma, seen = scores["sigma"], scores["visibility"] or {"brier": None, "ece": None}
    shares = [_text(_percent(sigma[name])) for name in ("within_1", "within_2")]
    lines.append(f"sigma: {shares[0]} % within 1 (68 expected), {shares[1]} % within 2 (95)")
    lines.append(f"visibility: Brier {_text(seen['brier'], 3)}, ECE {_text(seen['ece'], 3)}")
    return "\n".join(lines)


def scored_frames(query_points: np.ndarray, num_frames: int, mode: Mode) -> np.ndarray:
    """`(N, T)` bool: frames after the query frame (`first`), or all but it. Frames are rounded."""
    frame = np.arange(num_frames)
    query = np.rint(query_points[:, :1])
    return frame > query if mode == "first" else frame != query


def tap_vid(
    predicted: np.ndarray,
    predicted_visible: np.ndarray,
    true: np.ndarray,
    visible: np.ndarray,
    scored: np.ndarray,
) -> dict[str, float | None]:
    """AJ, delta_avg and OA with their parts, from positions at 256 x 256 scale."""
    deltas = {f"delta_{d}": delta(predicted, true, visible, scored, d) for d in DISTANCES}
    jaccards = {
        f"jaccard_{d}": jaccard(predicted, predicted_visible, true, visible, scored, d)
        for d in DISTANCES
    }
    return {
        "AJ": _average(jaccards),
        "delta_avg": _average(deltas),
        "OA": occlusion_accuracy(predicted_visible, visible, scored),
        **deltas,
        **jaccards,
    }


def occlusion_accuracy(
    predicted_visible: np.ndarray, visible: np.ndarray, scored: np.ndarray
) -> float | None:
    """Share of scored entries whose visibility is predicted correctly."""
    return _share(predicted_visible == visible, scored)


def delta(
    predicted: np.ndarray,
    true: np.ndarray,
    visible: np.ndarray,
    scored: np.ndarray,
    distance: float | np.ndarray,
) -> float | None:
    """Share of visible entries placed strictly within `distance`, whatever their predicted flag.

    `distance` may be an array that broadcasts to (N, T).
    """
    return _share(_within(predicted, true, distance), scored & visible)


def jaccard(
    predicted: np.ndarray,
    predicted_visible: np.ndarray,
    true: np.ndarray,
    visible: np.ndarray,
    scored: np.ndarray,
    distance: float | np.ndarray,
) -> float | None:
    """Count true positives over (visible entries + false positives).

    A true positive is visible, predicted so and within `distance`; any other entry predicted
    visible is a false positive, so that a visible but misplaced one is charged twice.
    """
    correct = _within(predicted, true, distance) & visible
    claimed = scored & predicted_visible
    total = (scored & visible).sum() + (claimed & ~correct).sum()
    return float((claimed & correct).sum() / total) if total else None


def temporal_coherence(
    predicted: np.ndarray, true: np.ndarray, visible: np.ndarray
) -> float | None:
    """Mean length of the difference of accelerations, in the units of the positions.

    Over frame triples in which the point is truly visible throughout; the predicted visibility and
    the query frame play no part.
    """
    error = predicted - true
    change = error[:, 2:] - 2 * error[:, 1:-1] + error[:, :-2]
    triple = visible[:, 2:] & visible[:, 1:-1] & visible[:, :-2]
    return _mean(np.linalg.norm(change[triple], axis=-1))


def segment_delta(
    predicted: np.ndarray,
    true: np.ndarray,
    visible: np.ndarray,
    scored: np.ndarray,
    mask_area: np.ndarray | None,
) -> float | None:
    """BADJA's delta_seg: share within 0.2 sqrt(area of the object), original pixels.

    `mask_area` is (T,) pixels, or None (then undefined). Frames without a mask do not count.
    """
    if mask_area is None:
        return None
    usable = scored & (mask_area > 0)
    return delta(predicted, true, visible, usable, 0.2 * np.sqrt(np.maximum(mask_area, 0)))


def sigma_calibration(
    predicted: np.ndarray, sigma: np.ndarray, true: np.ndarray, chosen: np.ndarray
) -> dict[str, float | None]:
    """Whether errors are as large as `sigma` predicts. Positions and sigma in the same pixels.

    `sigma` is a standard deviation per axis, so each axis is one observation: a calibrated
    Gaussian has `within_1` 0.68, `within_2` 0.95 and a mean standardised error of 0.80. `sigma`
    is (N, T), where entries that are not finite do not count; `chosen` (N, T) bool are the entries
    to score, such as the scored visible ones.
    """
    chosen = chosen & np.isfinite(sigma)
    error = np.abs(predicted[chosen] - true[chosen])
    ratio = error / np.maximum(sigma[chosen], 1e-6)[:, None]
    return {
        "within_1": _mean(ratio < 1),
        "within_2": _mean(ratio < 2),
        "mean_standardised_error": _mean(ratio),
    }


def visibility_calibration(
    probability: np.ndarray, visible: np.ndarray, scored: np.ndarray
) -> dict[str, Any]:
    """Brier score, expected calibration error and reliability bins of a visibility probability.

    Returns:
        `brier`, `ece`, and `bins`: for each tenth of probability that occurs its `count`, mean
        `predicted` probability and `observed` share of visible entries.
    """
    predicted = np.asarray(probability, np.float64)[scored]
    observed = visible[scored].astype(np.float64)
    index = np.clip((predicted * _BINS).astype(int), 0, _BINS - 1)
    bins: list[dict[str, Any]] = []
    for number in np.unique(index):
        inside = index == number
        bins.append(
            {
                "count": int(inside.sum()),
                "predicted": _mean(predicted[inside]),
                "observed": _mean(observed[inside]),
            }
        )
    gaps = [entry["count"] * abs(entry["predicted"] - entry["observed"]) for entry in bins]
    return {
        "brier": _mean((predicted - observed) ** 2),
        "ece": sum(gaps) / len(observed) if len(observed) else None,
        "bins": bins,
    }


def _check(prediction: Tracks, truth: Truth, mode: str) -> None:
    expected, frames = truth.query_points, truth.tracks.shape[1]
    if prediction.tracks.shape[1] != frames:
        raise OmniError(
            f"the prediction has {prediction.tracks.shape[1]} frames, the truth {frames}: "
            "track the same clip without start, stop or stride"
        )
    points = prediction.query_points
    same = points.shape == expected.shape
    if same:
        xy = rescale(points[:, :0:-1], prediction.size, truth.size)
        same = np.allclose(xy, expected[:, :0:-1], rtol=0, atol=_TOLERANCE)
        same = same and np.array_equal(np.rint(points[:, 0]), np.rint(expected[:, 0]))
    if not same:
        source = f"omni.evaluation.queries(truth, {mode!r})"
        raise OmniError(
            f"the prediction's {len(points)} query_points are not the {len(expected)} queries "
            f"of mode {mode!r}: track those of {'the truth' if mode == 'given' else source}"
        )
    if not np.isfinite(prediction.tracks).all():
        raise OmniError(
            "the prediction holds positions that are not finite: give one at every frame and "
            "mark hidden ones in visible"
        )


def _within(predicted: np.ndarray, true: np.ndarray, distance: float | np.ndarray) -> np.ndarray:
    # NaN (not annotated) compares as False, which `scored` leaves out.
    return np.square(predicted - true).sum(axis=-1) < np.square(distance)


def _share(hit: np.ndarray, among: np.ndarray) -> float | None:
    return _mean(hit[among])


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if np.size(values) else None


def _average(parts: dict[str, float | None]) -> float | None:
    values = [value for value in parts.values() if value is not None]
    return None if len(values) < len(parts) else float(np.mean(values))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _text(value: float | str | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
