"""Accuracy of dense answers, from coarse to fine, beside the exact read-out and chains alone.

    python benchmarks/dense.py --data ../shared/data/synthetic/dev --config cpu

Scores the 4,096 `dense_tracks` of each clip, every fourth pixel of its first frame, and those of
them within 8 px of another segment. `cpu_ms` is the processor time for one of these points, without
the anchors, whose time comes on top. Fits are kept, as those of `quality.py`.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from quality import Clip, find_clips, fitted
from record import markdown, write_record

from omni import run as runs
from omni.config import Config, load_config
from omni.errors import OmniError
from omni.evaluation import Truth, evaluate
from omni.tracking import Reader, read_arrays

BORDER = 8.0
"""Pixels from another segment within which a point counts as near a motion border."""

MEASURES = ("AJ", "delta_avg", "OA")


def main() -> None:
    """Answer and score every clip; print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="clips or folders")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="kept run folders")
    parser.add_argument("--config", default="cpu", help="preset or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    rows: list[dict[str, object]] = []
    for clip in find_clips(options.data, options.runs):
        for row in measure(clip, options.runs, config):
            rows.append({"clip": clip.name, **row})
            print(rows[-1], file=sys.stderr)
    rows += means(rows)
    columns = list(rows[0])
    print(markdown(columns, [[row.get(name) for name in columns] for row in rows]))
    if options.out:
        write_record(options.out, results=rows)


def measure(clip: Clip, cache: Path, config: Config) -> Iterator[dict[str, object]]:
    """Scores of the three ways on all dense points of a clip, and on those near borders."""
    names = ("dense_query", "dense_tracks", "dense_visible", "segmentation")
    arrays = read_arrays(clip.source, names)
    points = arrays["dense_query"].astype(np.float32)
    visible = arrays["dense_visible"]
    truth = dataclasses.replace(
        clip.truth,
        query_points=points,
        tracks=arrays["dense_tracks"],
        visible=visible,
        annotated=np.ones(visible.shape, bool),
    )
    near = near_border(arrays["segmentation"][0], points)
    run = runs.load(fitted(clip, cache, config), config.device)
    readers: dict[str, Reader] = {
        "coarse to fine": run.dense_reader(0),
        "exact": run.reader,
        "chains": Reader(run.store, None, config.output.chunk),
    }
    for name, reader in readers.items():
        start = time.process_time()
        tracks = reader.tracks(points)
        spent = 1000 * (time.process_time() - start) / len(points)
        row: dict[str, object] = {"answer": name}
        for rows, place in ((slice(None), ""), (near, " near")):
            scores = evaluate(tracks.subset(rows), subset(truth, rows), "given")
            row |= {measure + place: round(100 * scores[measure], 1) for measure in MEASURES}
        yield row | {"cpu_ms": round(spent, 2)}


def subset(truth: Truth, rows: slice | np.ndarray) -> Truth:
    """The ground truth of some of the points."""
    names = ("query_points", "tracks", "visible", "annotated")
    return dataclasses.replace(truth, **{name: getattr(truth, name)[rows] for name in names})


def near_border(segments: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`(N,)` bool: queries (N, 3) t y x within BORDER of another segment of the frame (h, w)."""
    border = np.zeros(segments.shape, bool)
    border[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    border[1:] |= segments[1:] != segments[:-1]
    distance = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, 5)
    row, column = points[:, 1:].astype(int).T
    return distance[row, column] < BORDER


def means(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """One row per answer: the mean over clips."""
    result = []
    for name in dict.fromkeys(row["answer"] for row in rows):
        same = [row for row in rows if row["answer"] == name]
        numbers = [key for key in same[0] if key not in ("clip", "answer")]
        mean = {key: round(float(np.mean([row[key] for row in same])), 2) for key in numbers}
        result.append({"clip": "mean", "answer": name, **mean})
    return result


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"dense: {error}")
