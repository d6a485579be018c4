"""Time and memory of `omni`: its stages, their growth with the video's length, dense exports.

    python benchmarks/speed.py --parts stages --threads 1 2 -o speed.json
    python benchmarks/speed.py --parts dense --clips ../shared/data/real/horsejump-high --strides 1

Everything together takes hours; each part, clip and number of threads can be chosen. Every
measurement is a process of its own (`stages.py`). `stages` and `growth` start from nothing; `dense`
keeps the fitted run and reuses it. Seconds and peak memory are those of `report.json`; on a shared
machine compare processor seconds, best with an older version in turns. `--beside` adds the figures
of earlier records, with the ratio of processor time, this one's to theirs.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from quality import unpack
from record import markdown, write_record
from stages import STAGES, measure

from omni.config import load_config
from omni.errors import OmniError
from omni.store import Store
from omni.system import digest, to_dict

TUMBLE, KITCHEN = "../shared/data/synthetic/dev/tumble.npz", "../shared/data/real/kitchen-A"
CLIPS = {"stages": [TUMBLE, KITCHEN], "growth": [KITCHEN], "dense": [TUMBLE]}
"""Clips of each part where none are given."""

KEY = ("part", "clip", "frames", "threads", "stage", "stride", "times")
"""What identifies a row in records of different versions."""

MEASURES = {"stages": "seconds", "growth": "ms_per_frame", "dense": "ms_per_pixel"}
GREW_FROM = 50
"""Frames from which the cost of a frame should stay: the longest gaps need some."""

Rows = Iterator[dict[str, object]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen parts; print the tables and write the JSON."""
    options = parse(arguments)
    beside = {path.stem: json.loads(path.read_text())["results"] for path in options.beside}
    config = load_config(options.config, overrides(options, options.threads[0]))
    options.runs.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for part in options.parts:
        for threads, clip in itertools.product(options.threads, options.clips or CLIPS[part]):
            for row in PARTS[part](options, Path(clip), threads):
                rows.append({"part": part, "clip": name_of(Path(clip)), "threads": threads, **row})
                print(rows[-1], file=sys.stderr)
                if options.out:
                    write_record(options.out, config=to_dict(config), results=rows)
    print(tables(rows, beside))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clips", nargs="+", help=".npz, folders of frames, NAME/frames, videos")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="0: the default")
    parser.add_argument("--frames", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--strides", type=int, nargs="+", default=[4], help="of dense exports")
    parser.add_argument("--steps", type=int, help="of each fit, to shorten it")
    parser.add_argument("--config", default="cpu", help="preset or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs/speed"), help="working folder")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="older JSON to show")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    return parser.parse_args(arguments)


def overrides(options: argparse.Namespace, threads: int) -> list[str]:
    """Settings of a run with this number of threads."""
    steps = [f"optim.steps={options.steps}"] if options.steps else []
    return [*options.set, *steps, f"threads={threads}", f"flow.workers={threads}"]


def name_of(clip: Path) -> str:
    """The clip's name in tables."""
    return clip.parent.name if clip.name == "frames" else clip.stem


def frames_of(clip: Path, cache: Path) -> Path:
    """What `omni optimize` reads of a clip: a folder of frames, or a video file.

    Raises:
        OmniError: there is no such clip.
    """
    if clip.suffix == ".npz":
        return unpack(clip, cache)
    if not clip.exists():
        raise OmniError(f"{clip} does not exist: give an .npz, a folder of frames or a video")
    return clip / "frames" if (clip / "frames").is_dir() else clip


def played(frames: Path, count: int, folder: Path) -> Path:
    """A folder of `count` links to frames, played forward and backward until there are enough.

    Raises:
        OmniError: `frames` is no folder with at least two images.
    """
    files = sorted(p for p in frames.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < 2:
        raise OmniError(f"{frames} is no folder of frames, which is needed to change its length")
    folder.mkdir(parents=True)
    forth_and_back = itertools.cycle([*files, *files[-2:0:-1]])
    for t, file in enumerate(itertools.islice(forth_and_back, count)):
        os.symlink(file.resolve(), folder / f"{t:05d}{file.suffix}")
    return folder


def stages(options: argparse.Namespace, clip: Path, threads: int) -> Rows:
    """Every stage of `omni optimize` on a clip, and their sum."""
    with tempfile.TemporaryDirectory(dir=options.runs) as folder:
        rows = list(_run(options, frames_of(clip, options.runs), Path(folder) / "run", threads))
    yield from rows
    sums = {name: round(sum(r[name] for r in rows), 2) for name in ("seconds", "cpu_seconds")}
    peaks = {name: max(r[name] or 0 for r in rows) for name in ("peak_mb", "tree_mb")}
    yield {"stage": "total", "frames": rows[0]["frames"], **sums, **peaks}


def growth(options: argparse.Namespace, clip: Path, threads: int) -> Rows:
    """Every stage but the last on the clip at several lengths, per frame."""
    for count in options.frames:
        with tempfile.TemporaryDirectory(dir=options.runs) as folder:
            video = played(frames_of(clip, options.runs), count, Path(folder) / "video")
            for row in _run(options, video, Path(folder) / "run", threads, STAGES[:-1]):
                each = {"ms_per_frame": round(1000 * row["seconds"] / count, 2)}
                each["cpu_ms_per_frame"] = round(1000 * row["cpu_seconds"] / count, 2)
                yield {**row, **each}


def dense(options: argparse.Namespace, clip: Path, threads: int) -> Rows:
    """Dense exports of frame 0, at all times and at one alone."""
    settings = overrides(options, threads)
    config = to_dict(load_config(options.config, settings))
    video = frames_of(clip, options.runs)
    run = options.runs / f"{name_of(clip)}-{digest(str(video.resolve()), config)}"
    if not (run / "checkpoint.pt").is_file():
        measure("preprocess", run, video, options.config, settings)
    measure("fit", run)
    frames = Store.open(run).num_frames
    if not (run / "anchors").exists():
        yield {"stage": "anchors", "frames": frames, **measure("anchors", run)}
    answers = {"dense": [], "dense, one time": [f"--time={frames - 1}"]}
    for stride, (name, how) in itertools.product(options.strides, answers.items()):
        row = measure("dense", run, how=[*how, f"--stride={stride}"])
        each = {"ms_per_pixel": round(1000 * row["seconds"] / row["pixels"], 4)}
        yield {"stage": name, "stride": stride, "frames": frames, **row, **each}


PARTS: dict[str, Callable[[argparse.Namespace, Path, int], Rows]]
PARTS = {"stages": stages, "growth": growth, "dense": dense}


def _run(
    options: argparse.Namespace,
    video: Path,
    run: Path,
    threads: int,
    chosen: Sequence[str] = STAGES,
) -> Rows:
    """Measure the stages of a new run one after the other."""
    settings = overrides(options, threads)
    for stage in chosen:
        first = stage == "preprocess"
        row = measure(stage, run, video, options.config if first else "", settings if first else ())
        yield {"stage": stage, "frames": Store.open(run).num_frames, **row}


def tables(rows: list[dict], beside: dict[str, list[dict]]) -> str:
    """Markdown tables of all parts, with the figures of older records, by their names."""
    return "\n\n".join(
        table(part, [row for row in rows if row["part"] == part], beside)
        for part in dict.fromkeys(row["part"] for row in rows)
    )


def table(part: str, rows: list[dict], beside: dict[str, list[dict]]) -> str:
    """The Markdown table of one part; older figures show as `value (CPU x ratio)`."""
    measured = MEASURES[part]
    columns = ["clip", "frames", "threads", "stage"]
    columns += ["stride", "pixels"] if part == "dense" else []
    shown = list(dict.fromkeys(["seconds", "cpu_seconds", measured, "peak_mb", "tree_mb"]))
    grew = [f"CPU of {GREW_FROM} frames"] if part == "growth" else []
    older = {name: {_key(row): row for row in old} for name, old in beside.items()}
    lines = []
    for row in rows:
        cells = [row.get(column) for column in (*columns, *shown)]
        cells += [_growth(row, rows)] if grew else []
        lines.append(
            [*cells, *(_older(row, old.get(_key(row)), measured) for old in older.values())]
        )
    return markdown([*columns, *shown, *grew, *older], lines)


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def _growth(row: dict, rows: list[dict]) -> str | None:
    """Processor time per frame, as a multiple of that at GREW_FROM frames."""
    same = [r for r in rows if all(r[n] == row[n] for n in ("clip", "threads", "stage"))]
    base = next((r for r in same if r["frames"] == GREW_FROM), None)
    if base is None or not base["cpu_ms_per_frame"]:
        return None
    return f"{row['cpu_ms_per_frame'] / base['cpu_ms_per_frame']:.2f}"


def _older(row: dict, old: dict | None, measured: str) -> str | None:
    if old is None:
        return None
    ratio = row["cpu_seconds"] / old["cpu_seconds"] if old["cpu_seconds"] else float("nan")
    return f"{old[measured]} (CPU x {ratio:.2f})"


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"speed: {error}")
