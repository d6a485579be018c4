"""Calibrate error models of flows and chains on generated clips with exact ground truth.

    python scripts/calibrate.py --work runs/calibration

Writes `preprocess/evidence/sigma.json` (standard deviations of flows by gap) and
`omni/tracking/calibration.json` (models of visibility, trust and sigma from the cues of chains).
The evaluation clips are not used. Each scene of `omni.synthetic` is rendered and preprocessed;
flows and chains are then compared with the ground truth. `scripts/train_selection.py` does the same
for the read-out of a fit, and is run after it. Flow of another provider, leaving the rest as it is:

    python scripts/calibrate.py --work runs/calibration-raft --set flow.provider=raft --sigma-only
"""

import argparse
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from scipy.optimize import minimize

from omni import run as runs
from omni.config import Config, load_config
from omni.maths import inside
from omni.store import Store
from omni.synthetic import SCENES, SyntheticClip, filmed_frames, make_clip
from omni.tracking import CUES, Links, Reader
from preprocess.evidence import cycle_residuals, reload_sigma

RANDOM = ["mixed", "walk", "desk"]
"""scenes that differ from seed to seed, for `scripts/train_selection.py`"""
NAMED = [scene for scene in SCENES if scene not in RANDOM]
SIZE = (256, 256)
POINTS = 400
"""points per frame at which flows are compared with the truth"""
RELIABLE = 1.5
"""forward-backward error in pixels up to which a flow's sigma is fitted"""
WITHIN = 6.0
"""pixels within which a visible point counts as trusted"""
THRESHOLD = 0.22
"""least P(visible and within 6 px) of a point called visible. J / (1 + J) = 0.4 is best for AJ at
J = 0.67; chains trade one point of AJ for one of OA"""
QUANTILES = ((0.72, 1, 0.5), (0.94, 2, 1.0))
"""share of errors that lie within a multiple of sigma, that multiple, and the weight of the
quantile: errors have heavier tails than a Gaussian, whose shares would be 0.68 and 0.95"""
LARGEST_ERROR = 200.0

REPO = Path(__file__).resolve().parent.parent
SIGMA_PATH = REPO / "preprocess" / "evidence" / "sigma.json"
CALIBRATION_PATH = REPO / "omni" / "tracking" / "calibration.json"


def main() -> None:
    """Render, read out, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--scenes", nargs="+", default=NAMED, choices=list(SCENES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--frames", type=int, default=36)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--sigma-only", action="store_true", help=f"write {SIGMA_PATH.relative_to(REPO)} only"
    )
    options = parser.parse_args()
    config = load_config("cpu", options.set)
    command = f"scenes {' '.join(options.scenes)}, seeds {options.seeds}, {options.frames} frames"
    command += "".join(f", {setting}" for setting in options.set)
    made_by = f"scripts/calibrate.py: {command}"
    clips = [(scene, seed) for scene in options.scenes for seed in options.seeds]
    folders = [options.work / f"{scene}-{seed}" for scene, seed in clips]
    for folder, (scene, seed) in zip(folders, clips, strict=True):
        prepare(folder, scene, seed, options.frames, config)
    write_sigma(folders, clips, made_by)
    if options.sigma_only:
        return
    fitted = fit([sample(folder, config) for folder in folders])
    result = {"made_by": made_by, "threshold": THRESHOLD, **fitted}
    CALIBRATION_PATH.write_text(json.dumps(result, indent=1) + "\n")


def prepare(
    folder: Path, scene: str, seed: int, frames: int, config: Config, filmed: bool = False
) -> None:
    """Render a clip, save the ground truth of 512 queries in all frames, and compute its flows.

    With `filmed` the effects of a camera and a codec are simulated.
    """
    truth, images = folder / "truth.npz", folder / "frames"
    if not truth.is_file():
        images.mkdir(parents=True, exist_ok=True)
        clip = make_clip(scene, frames, SIZE, seed)
        for t, image in enumerate(filmed_frames(clip.video, seed) if filmed else clip.video):
            iio.imwrite(images / f"{t:04d}.png", image)
        queries = clip.queries(512)
        tracks, visible = clip.track(queries)
        np.savez(truth, queries=queries, tracks=tracks, visible=visible)
    runs.preprocess_video(images, folder / "run", config)


def write_sigma(folders: list[Path], clips: list[tuple[str, int]], made_by: str) -> None:
    """Fit floor and slope of each gap, then measure the cycle residuals; write all of them."""
    stores = [Store.open(folder / "run") for folder in folders]
    errors = [flow_errors(store, *clip) for store, clip in zip(stores, clips, strict=True)]
    joined = np.concatenate(errors)
    lines = {}
    for gap in np.unique(joined[:, 0]).astype(int).tolist():
        chosen = joined[joined[:, 0] == gap]
        lines[gap] = [*line(chosen[:, 1], chosen[:, 2:]), 0.0]
    for gap in lines:
        residuals = [
            cycle_residuals(store, store.evidence, RELIABLE, gap, lines) for store in stores
        ]
        every = np.concatenate(residuals)
        lines[gap][2] = round(float(np.median(every)), 4) if len(every) else 0.0
    # Gap 1 has no cycles of its own.
    provider = stores[0].meta("flow")["provider"]
    table = json.loads(SIGMA_PATH.read_text()) if SIGMA_PATH.is_file() else {"providers": {}}
    table["made_by"] = made_by
    table["providers"][provider] = lines
    SIGMA_PATH.write_text(json.dumps(table, indent=1) + "\n")
    reload_sigma()


def flow_errors(store: Store, scene: str, seed: int) -> np.ndarray:
    """Rows (gap, cycle error, |x error|, |y error|) of reliable flows to visible points."""
    links, count = Links(store), store.num_frames
    blank = np.zeros((count, *SIZE, 3), np.uint8)
    clip = SyntheticClip(scene, seed, SCENES[scene](SIZE, np.random.default_rng(seed)), blank)
    rng, rows = np.random.default_rng((seed, 7)), []
    for t in range(1, count, 4):
        xy = rng.uniform(1, min(SIZE) - 1, (POINTS, 2)).astype(np.float32)
        queries = np.concatenate([np.full((POINTS, 1), t, np.float32), xy[:, ::-1]], axis=1)
        tracks, visible = clip.track(queries)
        for gap in links.gaps:
            for other in (t - gap, t + gap):
                if links.stored(t, other):
                    arrived, error = links.follow(t, other, xy)
                    good = visible[:, other] & inside(arrived, SIZE) & (error < RELIABLE)
                    off = np.abs(arrived - tracks[:, other])[good]
                    gaps = np.full((len(off), 1), gap)
                    rows.append(np.concatenate([gaps, error[good][:, None], off], axis=1))
    return np.concatenate(rows)


def line(error: np.ndarray, off: np.ndarray) -> list[float]:
    """Floor and slope such that 68 % of `off` (n, 2) lie below, by quantile regression on
    `error` (n,).
    """
    error, off = np.repeat(error, 2), off.ravel()

    def loss(b):
        over = off - np.exp(b[0]) - np.exp(b[1]) * error
        return np.mean(np.maximum(0.68 * over, -0.32 * over))

    starts = [np.log([floor, slope]) for floor in (0.05, 0.2) for slope in (0.3, 0.8)]
    best = min((minimize(loss, s, method="Nelder-Mead") for s in starts), key=lambda r: r.fun)
    return np.exp(best.x).round(4).tolist()


def sample(folder: Path, config: Config) -> tuple:
    """Cues, positions, truth and visibility of one clip."""
    with np.load(folder / "truth.npz", allow_pickle=False) as data:
        queries, tracks, visible = data["queries"], data["tracks"], data["visible"]
    # With the new sigma: only the stages that depend on it are computed again.
    run = runs.preprocess_video(folder / "frames", folder / "run", config)
    return *Reader(run.store, None, 8192).chain_cues(queries), tracks, visible


def fit(parts: list[tuple]) -> dict[str, object]:
    """Coefficients of the three models from (cues, positions, truth, visible) of each clip."""
    values = np.concatenate([c.reshape(-1, c.shape[-1]) for c, *_ in parts]).astype(np.float64)
    error = np.concatenate([(xy - truth).reshape(-1, 2) for _, xy, truth, _ in parts])
    visible = np.concatenate([v.ravel() for *_, v in parts])
    near = np.linalg.norm(error, axis=-1) < WITHIN
    return {
        "cues": list(CUES),
        "visibility": logistic(values, visible).round(4).tolist(),
        "trust": logistic(values, visible & near).round(4).tolist(),
        "log_sigma": log_sigma(values[visible], error[visible]).round(4).tolist(),
    }


def logistic(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Ridge logistic regression."""

    def loss(b):
        z = values @ b
        p = 1 / (1 + np.exp(-z))
        value = np.mean(np.logaddexp(0, z) - truth * z) + 1e-4 * b @ b
        return value, values.T @ (p - truth) / len(truth) + 2e-4 * b

    return minimize(loss, np.zeros(values.shape[1]), jac=True, method="L-BFGS-B").x


def log_sigma(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Log sigma, linear in the cues, by quantile regression of log |error| per axis.

    Quantiles and not likelihood: the largest errors of lost points would dominate the rest.
    """
    size = np.log(np.clip(np.abs(error), 1e-3, LARGEST_ERROR))

    def loss(b):
        z, value, slope = values @ b, 1e-4 * b @ b, 0.0
        for share, times, weight in QUANTILES:
            over = size - (z + np.log(times))[:, None]
            value += weight * np.mean(np.maximum(share * over, (share - 1) * over))
            slope = slope - weight * np.where(over > 0, share, share - 1).mean(1)
        return value, values.T @ slope / len(z) + 2e-4 * b

    start = np.zeros(values.shape[1])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


if __name__ == "__main__":
    main()
