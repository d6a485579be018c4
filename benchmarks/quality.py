"""Accuracy against ground truth: one table, clips x methods, and the JSON behind it.

    python benchmarks/quality.py --data ../shared/data/synthetic/dev --config cpu --seeds 3 \
        --set data.resolution=256 -o quality.json

Methods: `ours` is `omni optimize`, `chains` is `omni track`, the others are `omni baseline`.
A clip is an .npz holding video and truth, or a folder with frames/ and truth.npz. Run folders are
kept and reused. Seconds are the wall time from video to tracks, as each run's report adds it up.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from record import write_record

from omni import run as runs
from omni.config import Config, load_config
from omni.errors import OmniError
from omni.evaluation import Truth, baseline, evaluate, load_truth, queries
from omni.store import Store
from omni.system import digest, to_dict
from omni.tracking import Reader, read_arrays

METHODS = ("ours", "chains", "mft", "chain", "direct")
COLUMNS = ("AJ", "delta_avg", "OA", "TC", "delta_seg", "delta_3px", "seconds")
FORMATS = {"TC": (1, 2), "seconds": (1, 1), "median": (1, 3), "psnr": (1, 1)}
FORMATS |= {"hidden": (1, 2), "field hidden": (1, 2)}
"""Factor and decimals of the columns that are no shares, which are in percent."""


@dataclass(frozen=True)
class Clip:
    """A video, as a folder of frames, and its ground truth, from a file or folder."""

    name: str
    frames: Path
    truth: Truth
    source: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every method on every clip; print the table and write the JSON."""
    options = parse(arguments)
    config = load_config(options.config, options.set)
    rows = []
    for clip in find_clips(options.data, options.runs):
        for method in options.methods:
            for seed in range(options.seeds if method == "ours" else 1):
                row = measure(clip, method, seed, options.runs, config, options.mode)
                rows.append({"clip": clip.name, "method": method, "seed": seed, **row})
                print(f"{clip.name} {method} {seed}: AJ {_cell('AJ', row)}", file=sys.stderr)
    print(table(rows))
    if options.out:
        write_record(options.out, config=to_dict(config), results=rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="clips or folders")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="kept run folders")
    parser.add_argument("--config", default="", help="preset or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--mode", choices=("first", "strided", "given"), default="given")
    parser.add_argument("--seeds", type=int, default=1, help="fits per clip of method ours")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    return parser.parse_args(arguments)


def find_clips(folders: Sequence[Path], cache: Path) -> list[Clip]:
    """Every clip under `folders`, by name; frames of an .npz are unpacked into `cache`.

    Raises:
        OmniError: there is none.
    """
    clips = []
    for folder in folders:
        for path in [folder] if _is_clip(folder) else sorted(filter(_is_clip, folder.glob("*"))):
            if path.is_dir():
                clips.append(Clip(path.name, path / "frames", load_truth(path / "truth.npz"), path))
            else:
                clips.append(Clip(path.stem, unpack(path, cache), load_truth(path), path))
    if not clips:
        raise OmniError(f"no clips in {', '.join(map(str, folders))}: .npz, or NAME/truth.npz")
    return clips


def unpack(path: Path, cache: Path) -> Path:
    """Write the `video` (T, H, W, 3) of an .npz as PNGs, once; returns their folder."""
    folder = cache / f"{path.stem}_frames"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for t, frame in enumerate(read_arrays(path, ("video",))["video"]):
            cv2.imwrite(str(partial / f"{t:05d}.png"), frame[..., ::-1])
        partial.rename(folder)
    return folder


def measure(
    clip: Clip, method: str, seed: int, cache: Path, config: Config, mode: str
) -> dict[str, object]:
    """Scores of one method on one clip, and its seconds from video to tracks."""
    config = dataclasses.replace(config, seed=seed)
    points = queries(clip.truth, mode).query_points
    if method == "ours":
        folder = fitted(clip, cache, config)
        opened = runs.load(folder, config.device)
    else:
        folder = prepared(clip, cache, config)
    start = time.monotonic()
    tracks = opened.tracks(points) if method == "ours" else _baseline(folder, points, method)
    seconds = time.monotonic() - start + _reported_seconds(folder, method)
    return {**evaluate(tracks, clip.truth, mode), "seconds": round(seconds, 2)}


def prepared(clip: Clip, cache: Path, config: Config) -> Path:
    """Preprocess a clip once for these settings; returns the run folder.

    A finished one is not entered again: reports add up, and the time of a cache check is not the
    time of preprocessing. So every group of settings has a folder of its own, too.
    """
    settings = to_dict(config)
    parts = str(clip.frames.resolve()), settings["data"], settings["flow"], config.device
    folder = cache / f"{clip.name}-{digest(*parts)}"
    if not Store(folder).has("evidence"):
        runs.preprocess_video(clip.frames, folder, config)
    return folder


def fitted(clip: Clip, cache: Path, config: Config, name: str = "") -> Path:
    """Fit a clip once with these settings; returns the run folder. `name` marks another model."""
    base = prepared(clip, cache, config)
    key = digest(base.name, to_dict(config))
    folder = fork(base, cache / "-".join(filter(None, (clip.name, name, key))))
    runs.fit(folder, config)
    return folder


def fork(folder: Path, other: Path) -> Path:
    """Make (once) a run folder `other` for a fit, sharing the prepared store's files."""
    if not other.is_dir():
        partial = other.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder / "store", partial / "store", copy_function=os.link)
        for name in ("manifest.json", "report.json"):
            shutil.copy(folder / name, partial)
        partial.rename(other)
    return other


def table(rows: list[dict], columns: Sequence[str] = COLUMNS, by: str = "method") -> str:
    """Lay out a Markdown table: a line per clip and `by`, means last.

    +- is the standard deviation over seeds.
    """
    lines = [f"| clip | {by} | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    clips = list(dict.fromkeys(row["clip"] for row in rows))
    groups = list(dict.fromkeys(row[by] for row in rows))
    for clip in [*clips, "mean"]:
        for group in groups:
            chosen = [r for r in rows if r[by] == group and clip in (r["clip"], "mean")]
            seeds = _means_by_seed(chosen, columns)
            cells = " | ".join(_cell(column, *seeds) for column in columns)
            lines.append(f"| {clip} | {group} | {cells} |")
    return "\n".join(lines)


def _is_clip(path: Path) -> bool:
    return path.suffix == ".npz" or (path / "truth.npz").is_file()


def _baseline(folder: Path, points: np.ndarray, method: str):
    if method == "chains":
        return Reader(Store.open(folder), None, Config().output.chunk).tracks(points)
    return baseline(Store.open(folder), points, method)


def _reported_seconds(folder: Path, method: str) -> float:
    stages = json.loads((folder / "report.json").read_text())["stages"]
    used = ("preprocess", "fit") if method == "ours" else ("preprocess",)
    return sum(stages[stage]["seconds"] for stage in used)


def _means_by_seed(rows: list[dict], columns: Sequence[str]) -> list[dict]:
    """One dict per seed: each column's mean over the clips where it is defined."""
    means = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        defined = {c: [r[c] for r in mine if r[c] is not None] for c in columns}
        means.append({c: float(np.mean(v)) if v else None for c, v in defined.items()})
    return means


def _cell(column: str, *seeds: dict) -> str:
    values = [row[column] for row in seeds]
    if None in values:
        return "-"
    scale, digits = FORMATS.get(column, (100, 1))
    text = f"{scale * np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} +- {scale * np.std(values, ddof=1):.{digits}f}"


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"quality: {error}")
