"""Everything there is to measure on a GPU, in one command of a few minutes.

    python benchmarks/gpu.py --minutes 8
    python benchmarks/gpu.py --device cpu --quick    # that the command itself works

Needs the working tree and the installed packages alone. Every part is a process of its own: one
that fails is recorded with its error, and when the time is over the rest is recorded as skipped.
The JSON is written anew after every part. Parts, in their order:

grid      tiny-cuda-nn's grid against the torch grid, or why it cannot be imported
tests     those marked `gpu`
devices   fits of one generated clip on the CPU and on the device: held-out errors
stages    `configs/default.yaml` on 100 frames of 480p, stage by stage
steps     steps per second of its fit
dense     dense exports of its frame 0, from coarse to fine while the time allows
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import uninstalled
from record import markdown, write_record
from speed import played
from stages import STAGES, measure, run_watched

from omni.errors import OmniError

FRAMES = Path("../shared/data/real/kitchen-A/frames")
"""Frames of about 480p, used where present."""

RESERVED = 75.0
"""Seconds that the fit of 480p leaves for what follows it."""

LARGEST_DIFFERENCE = 0.05
"""Relative difference of the mean held-out errors up to which devices agree."""

OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")

LONGEST = {"grid": 60.0, "tests": 150.0, "devices": 150.0, "steps": 90.0}
"""Seconds after which a part is stopped, so that it leaves some to those after it."""

Result = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        clip, clip_frames, clip_steps: size, frames and fitted steps of the clip of `devices`.
        video, rendered, frames: size of the generated video, its different frames, and all.
        seconds: time over which steps are counted.
        strides: of dense exports.
        settings: laid over `configs/default.yaml`.
    """

    clip: tuple[int, int] = (128, 160)
    clip_frames: int = 16
    clip_steps: int = 600
    video: tuple[int, int] = (480, 854)
    rendered: int = 12
    frames: int = 100
    seconds: float = 10.0
    strides: tuple[int, ...] = (16, 8, 4, 2, 1)
    settings: tuple[str, ...] = ()


LIGHT = "optim.steps=20 sampling.pairs=16 model.hidden=16 threads=1 flow.workers=1"
SMALL = (*LIGHT.split(), "output.render_frames=4", "output.render_side=32")
QUICK = Sizes((48, 64), 6, 40, (72, 96), 5, 8, 2.0, (4,), SMALL)
"""A minute or two on a laptop."""


def main() -> None:
    """Run the parts within the time; print a summary and write the JSON."""
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.part:
        result = CHILDREN[options.part](options)
        (options.folder / f"{options.part}.json").write_text(json.dumps(result))
        return
    end, results = time.monotonic() + 60 * options.minutes, {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for part in options.parts:
            results[part] = attempt(part, options, end - time.monotonic())
            print(f"{part}: {json.dumps(results[part])}", file=sys.stderr, flush=True)
            write_record(options.out, device=options.device, quick=options.quick, results=results)
    print(summary(results))
    print(f"\n{options.out}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which parts are skipped")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--video", type=Path, help="folder of frames; default: kitchen-A, rendered")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    parser.add_argument("--part", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = QUICK if options.quick else Sizes()
    if options.out is None:
        name = f"gpu_{options.device}_{'quick_' if options.quick else ''}{datetime.date.today()}"
        options.out = uninstalled.REPO / "benchmarks" / "results" / f"{name}.json"
    return options


def attempt(part: str, options: argparse.Namespace, left: float) -> Result:
    """The result of a part, or the error or the lack of time that prevented it."""
    if left <= 0:
        return {"skipped": f"the {options.minutes:g} minutes were over"}
    if options.device == "cuda" and not torch.cuda.is_available():
        return {"error": "no CUDA device is available: use --device cpu --quick to try the command"}
    start = time.monotonic()
    try:
        result = PARTS[part](options, start + min(left, LONGEST.get(part, left)))
    except Exception as error:  # recorded, so that the other parts still run
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "part_seconds": round(time.monotonic() - start, 1)}


def in_child(part: str) -> Callable[[argparse.Namespace, float], Result]:
    """A part that is computed by a function of CHILDREN, in a process of its own."""

    def run(options: argparse.Namespace, end: float) -> Result:
        command = [sys.executable, __file__, "--device", options.device, "--part", part]
        command += ["--folder", str(options.folder), *(["--quick"] if options.quick else [])]
        run_watched(command, end - time.monotonic(), part)
        return json.loads((options.folder / f"{part}.json").read_text())

    return run


def grid(options: argparse.Namespace) -> Result:
    """Differences and times of both grids, with the same parameters at the same points."""
    from omni.field.model import grid_encoding

    try:
        import tinycudann
    except Exception as error:  # it may also refuse the device
        return {"tinycudann": f"cannot be imported ({error})"}
    shape, device = (8, 16, 1.7, 19), torch.device("cuda")
    grids = {
        "torch": grid_encoding(*shape, False).to(device),
        "tinycudann": grid_encoding(*shape, True).to(device),
    }
    with torch.no_grad():
        grids["torch"].params.uniform_(-1, 1)
        grids["tinycudann"].params.copy_(grids["torch"].params)
    points, outputs, gradients, result = torch.rand(1 << 16, 3, device=device), [], [], {}
    for name, encoding in grids.items():
        for repeat in range(30):
            if repeat == 10:
                torch.cuda.synchronize()
                start = time.perf_counter()
            encoding.params.grad = None
            features = encoding(points)
            features.square().mean().backward()
        torch.cuda.synchronize()
        result[f"{name}_ms"] = round(1000 * (time.perf_counter() - start) / 20, 3)
        outputs.append(features.detach())
        gradients.append(encoding.params.grad.float().flatten())
    values, slopes = ((a - b).abs().max() / a.abs().max() for a, b in (outputs, gradients))
    result |= {"largest_difference": float(values), "largest_gradient_difference": float(slopes)}
    return {**result, "tinycudann": str(getattr(tinycudann, "__version__", "imported"))}


def tests(options: argparse.Namespace, end: float) -> Result:
    """Run the tests marked `gpu`, from the files that have any."""
    found = sorted((uninstalled.REPO / "tests").rglob("test_*.py"))
    files = [str(path) for path in found if "mark.gpu" in path.read_text(encoding="utf-8")]
    log = options.folder / "tests.txt"
    code = (
        "import contextlib, pytest, sys\n"
        f"with open({str(log)!r}, 'w') as log, contextlib.redirect_stdout(log):\n"
        f"    code = pytest.main(['-q', '-rA', '--tb=short', '-m', 'gpu', '-p', 'uninstalled',\n"
        f"        '-p', 'no:cacheprovider', '--continue-on-collection-errors',\n"
        f"        '--rootdir', {str(uninstalled.REPO)!r}, *{files!r}])\n"
        f"    print('exit code', int(code))"
    )
    run_watched([sys.executable, "-c", code], end - time.monotonic(), "tests")
    lines = log.read_text().splitlines()
    result: Result = {"outcome": [s for s in lines if s.startswith(OUTCOMES)], "summary": lines[-2]}
    if not lines[-1].endswith(" 0"):
        result["log"] = lines[-60:]
    return {**result, "files": [os.path.relpath(file, uninstalled.REPO) for file in files]}


def devices(options: argparse.Namespace) -> Result:
    """Fit one clip from the same flows and seed on the CPU and on the device."""
    from quality import fork

    from omni import run as runs
    from omni.config import load_config

    sizes, base = options.sizes, options.folder / "clip"
    render("demo", sizes.clip_frames, sizes.clip, options.folder / "clip_frames")
    common = [f"optim.steps={sizes.clip_steps}", f"optim.evaluate_every={sizes.clip_steps}"]
    common += ["flow.provider=dis", "data.resolution=0", "threads=1"]
    runs.preprocess_video(options.folder / "clip_frames", base, "cpu", common)
    result: dict[str, dict] = {}
    for number, device in enumerate(("cpu", options.device)):
        run = fork(base, options.folder / f"clip_{number}_{device}")
        runs.fit(run, load_config("cpu", [*common, f"device={device}"]))
        stage = json.loads((run / "report.json").read_text())["stages"]["fit"]
        error = {name: stage["held_out"][-1][name] for name in ("median", "mean", "within_1px")}
        result[f"{number} {device}"] = {"seconds": stage["seconds"], **error}
    first, second = result.values()
    ratio = {name: round(second[name] / first[name], 4) for name in ("median", "mean")}
    same = abs(ratio["mean"] - 1) <= LARGEST_DIFFERENCE
    return {"fits": result, "ratio": ratio, "mean_within_5_percent": same}


def render(name: str, frames: int, size: tuple[int, int], folder: Path) -> None:
    """Frames of a generated clip as PNGs."""
    import cv2

    from omni.synthetic import make_clip

    folder.mkdir(parents=True)
    for t, frame in enumerate(make_clip(name, frames, size).video):
        cv2.imwrite(str(folder / f"{t:05d}.png"), frame[..., ::-1])


def video(options: argparse.Namespace) -> Result:
    """Render the frames of 480p that are played forth and back."""
    render("demo", options.sizes.rendered, options.sizes.video, options.folder / "rendered")
    return {"rendered": options.sizes.rendered}


def stages(options: argparse.Namespace, end: float) -> Result:
    """Every stage of the default settings on the video; a failed one does not end the others."""
    folder, sizes, result = options.folder, options.sizes, {}
    source = options.video or (FRAMES if FRAMES.is_dir() and not options.quick else None)
    if source is None:
        result |= in_child("video")(options, end)
        source = folder / "rendered"
    frames, run = played(source, sizes.frames, folder / "video"), folder / "run"
    device, settings = [f"--device={options.device}"], [f"device={options.device}", *sizes.settings]
    rows: dict[str, Result] = {}
    for stage in STAGES:
        left = end - time.monotonic() - (RESERVED if stage == "fit" and not options.quick else 0)
        new = {"config": "default", "settings": settings} if stage == "preprocess" else {}
        try:
            rows[stage] = measure(stage, run, frames, timeout=max(1.0, left), how=device, **new)
        except OmniError as error:
            rows[stage] = {"error": str(error)}
    done = [row for row in rows.values() if "error" not in row]
    total = round(sum(row["seconds"] for row in done), 1)
    whole = {"seconds": total, "gpu_mb": max((row.get("gpu_mb", 0) for row in done), default=0)}
    rows["total" if len(done) == len(rows) else "total of those finished"] = whole
    shown = source.name if source.is_relative_to(folder) else str(source)
    return {"source": shown, "frames": sizes.frames, **result, "stages": rows}


def steps(options: argparse.Namespace) -> Result:
    """Steps per second of the fit, by a CUDA graph and without, and its peak memory."""
    from omni.config import load_config
    from omni.field import CapturedUpdate
    from omni.run import make_trainer
    from omni.store import Store

    settings = [f"device={options.device}", *options.sizes.settings, "optim.steps=100000"]
    config = load_config("default", settings)
    torch.set_num_threads(max(1, config.threads))
    store, device = Store.open(options.folder / "run"), torch.device(options.device)
    trainer = make_trainer(store, config, options.folder / "none.pt", device)
    if not isinstance(trainer.update, CapturedUpdate):
        return {"eager": count_steps(trainer, options.sizes.seconds)}
    result = {"captured": count_steps(trainer, options.sizes.seconds)}
    result["captured"]["refused"] = trainer.update.refused
    trainer.update = trainer.update.update
    return {**result, "eager": count_steps(trainer, options.sizes.seconds)}


def count_steps(trainer, seconds: float) -> Result:
    """Steps per second over a time, after some that are not counted; peak memory."""
    cuda = trainer.device.type == "cuda"

    def advance(limit: float, most: int) -> tuple[int, float]:
        start, count = time.perf_counter(), 0
        while count < most and time.perf_counter() - start < limit:
            trainer.train_step()
            trainer.step += 1
            count += 1
        if cuda:
            torch.cuda.synchronize()
        return count, time.perf_counter() - start

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    advance(seconds, 20)
    count, used = advance(seconds, 10**6)
    result: Result = {"steps_per_second": round(count / used, 2), "steps": count}
    result |= {"ms_per_step": round(1000 * used / count, 2)}
    if cuda:
        result["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return result


def dense(options: argparse.Namespace, end: float) -> Result:
    """Dense exports, each of the next finer grid, while the last one's cost per pixel allows."""
    run, result = options.folder / "run", {}
    if not (run / "checkpoint.pt").is_file():
        raise OmniError("there is no fitted run: the fit of `stages` failed or did not start")
    answers = {"dense": [], "one time": ["--time=1"]}
    for stride in options.sizes.strides:
        for name, how in answers.items():
            each = min((row["ms_per_pixel"] for row in _done(result, name)), default=0.0)
            width, height = options.sizes.video[::-1]
            needed = each * width * height / stride**2 / 1000
            left = end - time.monotonic() - 10
            label = f"{name}, stride {stride}"
            if needed > left or left <= 0:
                result[label] = {"skipped": f"needs {needed:.0f} s, {max(left, 0):.0f} s are left"}
                continue
            how = [*how, f"--stride={stride}", f"--device={options.device}"]
            try:
                row = measure("dense", run, timeout=left, how=how)
            except OmniError as error:
                result[label] = {"error": str(error)}
                continue
            each = round(1000 * row["seconds"] / row["pixels"], 4)
            result[label] = {**row, "ms_per_pixel": each}
    return {"exports": result}


def _done(result: dict[str, dict], name: str) -> Iterator[dict]:
    return (row for label, row in result.items() if label.startswith(name) and "seconds" in row)


CHILDREN = {"grid": grid, "devices": devices, "steps": steps, "video": video}
PARTS = {"grid": in_child("grid"), "tests": tests, "devices": in_child("devices")}
PARTS |= {"stages": stages, "steps": in_child("steps"), "dense": dense}


def summary(results: dict[str, Result]) -> str:
    """A Markdown table: a line per part, and one per stage, fit or export in it."""
    lines = []
    for part, result in results.items():
        plain = {k: v for k, v in result.items() if not isinstance(v, dict | list)}
        lines.append([part, "", _text(plain)])
        for name, value in result.items():
            if isinstance(value, dict):
                nested = any(isinstance(row, dict) for row in value.values())
                for label, row in (value if nested else {name: value}).items():
                    lines.append([part, label, _text(row) if isinstance(row, dict) else row])
    return markdown(["part", "what", "result"], lines)


def _text(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


if __name__ == "__main__":
    main()
