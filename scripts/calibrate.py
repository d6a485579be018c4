"""Fit `omni/calibration.json` on generated clips: how cues become visibility, trust and sigma.

    python scripts/calibrate.py --work runs/calibration --fit

Never looks at the evaluation clips. Each scene of `omni.synthetic` is rendered, preprocessed and,
with --fit, fitted; the chains (and the field) are read out at queries of all frames and compared
with the exact truth.
"""

import argparse
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from scipy.optimize import minimize

from omni import run as runs
from omni.confidence import CUES, FIELD_CUES
from omni.config import load_config
from omni.readout import Reader
from omni.store import Store
from omni.synthetic import SCENES, make_clip

WITHIN = 6.0
"""pixels at a short side of 256 within which a visible point counts as trusted"""
FARTHEST = 24.0
"""errors beyond this count as this: sigma must not be ruled by the worst"""


def main() -> None:
    """Render, read out, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    parser.add_argument("--frames", type=int, default=36)
    parser.add_argument("--fit", action="store_true", help="calibrate the fused read-out, too")
    options = parser.parse_args()
    samples = [
        sample(options.work / f"{scene}-{seed}", scene, seed, options.frames, options.fit)
        for scene in options.scenes
        for seed in options.seeds
    ]
    command = f"scenes {' '.join(options.scenes)}, seeds {options.seeds}, {options.frames} frames"
    path = Path(__file__).parent.parent / "omni" / "calibration.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    for kind in ("chains", "fused") if options.fit else ("chains",):
        parts = [part[kind] for part in samples]
        result[kind] = {"made_by": f"scripts/calibrate.py: {command}", **fit(parts)}
    path.write_text(json.dumps(result, indent=1) + "\n")


def sample(folder: Path, scene: str, seed: int, frames: int, fitted: bool) -> dict[str, tuple]:
    """Cues, visibility and errors of one generated clip, per kind of read-out."""
    truth, images = folder / "truth.npz", folder / "frames"
    if not truth.is_file():
        images.mkdir(parents=True, exist_ok=True)
        clip = make_clip(scene, frames, (256, 256), seed)
        for t, image in enumerate(clip.video):
            iio.imwrite(images / f"{t:04d}.png", image)
        queries = clip.queries(512)
        tracks, visible = clip.track(queries)
        np.savez(truth, queries=queries, tracks=tracks, visible=visible)
    with np.load(truth, allow_pickle=False) as data:
        queries, tracks, visible = data["queries"], data["tracks"], data["visible"]
    config = load_config("cpu")
    runs.preprocess_video(images, folder / "run", config)
    readers = {"chains": Reader(Store.open(folder / "run"), None, 8192)}
    if fitted:
        runs.fit(folder / "run", config)
        readers["fused"] = runs.load(folder / "run").reader
    return {kind: (*reader.evidence(queries), tracks, visible) for kind, reader in readers.items()}


def fit(parts: list[tuple]) -> dict[str, object]:
    """Coefficients of the three models from (cues, positions, truth, visible) of each clip."""
    values = np.concatenate([c.reshape(-1, c.shape[-1]) for c, *_ in parts]).astype(np.float64)
    error = np.concatenate([(xy - truth).reshape(-1, 2) for _, xy, truth, _ in parts])
    visible = np.concatenate([v.ravel() for *_, v in parts])
    near = np.linalg.norm(error, axis=-1) < WITHIN
    names = [*CUES, *FIELD_CUES][: values.shape[1]]
    spread = log_sigma(values[visible], error[visible])
    ratio = np.abs(error[visible]) / np.exp(values[visible] @ spread)[:, None]
    spread[0] += np.log(np.quantile(ratio, 0.7))
    return {
        "cues": names,
        "visibility": logistic(values, visible).round(4).tolist(),
        "trust": logistic(values, visible & near).round(4).tolist(),
        "log_sigma": spread.round(4).tolist(),
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
    """Log of a Gaussian's deviation, linear in the cues, by maximum likelihood per axis."""
    square = np.minimum(np.abs(error), FARTHEST) ** 2

    def loss(b):
        z = values @ b
        scaled = square.mean(-1) * np.exp(-2 * z)
        value = np.mean(z + scaled / 2) + 1e-4 * b @ b
        return value, values.T @ (1 - scaled) / len(z) + 2e-4 * b

    return minimize(loss, np.zeros(values.shape[1]), jac=True, method="L-BFGS-B").x


if __name__ == "__main__":
    main()
