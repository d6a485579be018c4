"""Effect of the photometric terms on the field itself, before fusion with chains.

    python benchmarks/sharpness.py --data ../shared/data/synthetic/dev --config cpu --seeds 3

For every set of terms: the median distance (pixels at 256 x 256) of the field's positions from the
true ones of visible points, shares within 1 pixel and of delta_avg, and the PSNR (dB) of the
pictures rendered from the canonical volume, every eighth frame. Fits are those of
`quality.py`, and kept.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from ablation import SETTINGS, field_alone, psnr
from quality import Clip, find_clips, fitted, table
from record import write_record

from omni import run as runs
from omni.config import Config, load_config
from omni.errors import OmniError
from omni.evaluation import evaluate, queries, scored_frames
from omni.maths import rescale

TERMS = {
    "both": [],
    "rendered colour alone": ["loss.constancy.weight=0"],
    "none": SETTINGS["no photometric"],
}
COLUMNS = ("median", "within_1px", "delta_avg", "psnr")


def main() -> None:
    """Fit and score every set of terms on every clip; print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="clips or folders")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=["both", "none"])
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="kept run folders")
    parser.add_argument("--config", default="cpu", help="preset or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=1, help="fits per clip and set of terms")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    rows = []
    for clip in find_clips(options.data, options.runs):
        for terms in options.terms:
            for seed in range(options.seeds):
                chosen = load_config(dataclasses.replace(config, seed=seed), TERMS[terms])
                rows.append({"clip": clip.name, "terms": terms, "seed": seed})
                rows[-1] |= measure(clip, options.runs, chosen)
                print(rows[-1], file=sys.stderr)
    print(table(rows, COLUMNS, by="terms"))
    if options.out:
        write_record(options.out, results=rows)


def measure(clip: Clip, cache: Path, config: Config) -> dict[str, float]:
    """Sharpness of one fit of one clip."""
    reader = runs.load(fitted(clip, cache, config), config.device).reader
    truth = queries(clip.truth, "given")
    points = truth.query_points.astype(np.float32)
    tracks = field_alone(reader, points)
    scores = evaluate(tracks, truth, "given")
    distance = np.linalg.norm(
        rescale(tracks.tracks, tracks.size, (256, 256))
        - rescale(truth.tracks, truth.size, (256, 256)),
        axis=-1,
    )
    scored = scored_frames(points, reader.num_frames, "given") & truth.visible & truth.annotated
    return {
        "median": float(np.median(distance[scored])),
        "within_1px": scores["delta_1"],
        "delta_avg": scores["delta_avg"],
        "psnr": psnr(reader),
    }


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"sharpness: {error}")
