"""One stage of `omni optimize`, or one dense export, measured in a process of its own.

    python benchmarks/stages.py fit runs/video --set optim.steps=500 --result fit.json

Peak memory of a process never falls, so that a stage after another would show that of both. Other
benchmarks call `measure`.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import uninstalled  # noqa: F401 - before omni

from omni.errors import OmniError
from omni.system import read_report

__all__ = ["STAGES", "measure"]

STAGES = ("preprocess", "chains", "fit", "anchors", "export", "visualize")
"""Stages of `omni.optimize` in their order, by their names in `report.json`."""

WATCH_EVERY = 0.3
"""Seconds between two looks at the memory of a process and of those it started."""

GRACE = 30.0
"""Seconds that a process has to save its state when its time is over."""


def measure(
    action: str,
    run: Path,
    video: Path | None = None,
    config: str = "",
    settings: Sequence[str] = (),
    timeout: float | None = None,
    how: Sequence[str] = (),
) -> dict[str, float]:
    """What a stage takes in a new process.

    Args:
        action: one of STAGES, or `dense`.
        run: run folder.
        video: for `preprocess`.
        config: preset or YAML file, for `preprocess`; later stages read the run's own settings.
        settings: `section.key=value` texts laid over it.
        timeout: seconds after which the process is stopped; it then has GRACE to save its state.
        how: further options of this script.

    Returns:
        `seconds` and `peak_mb` of `report.json` (and `gpu_mb` on a GPU); the peak is at least that
        of the process that starts this one, .6 GB where it imports `omni`. `cpu_seconds` of the
        process and of those it started, without imports; `tree_mb`, the largest memory that all of
        them held together (Linux; shared pages count once); for `dense` also `pixels`, `times`.

    Raises:
        OmniError: the process failed, with the last line it wrote; or its time was over.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, action, str(run), "--result", str(result), *how]
        command += ["--video", str(video)] if video else []
        command += ["--config", config] if config else []
        command += [f"--set={setting}" for setting in settings]
        peak = run_watched(command, timeout, action)
        return {**json.loads(result.read_text()), "tree_mb": peak}


def run_watched(command: Sequence[str], timeout: float | None, name: str) -> int | None:
    """Run a command in a session of its own; the peak memory of all its processes, MB.

    None where the system does not report memory. Output goes to a temporary file.

    Raises:
        OmniError: as `measure`.
    """
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        over = False
        try:
            while process.poll() is None and not over:
                peak = max(peak, _held(process.pid))
                over = timeout is not None and time.monotonic() - start > timeout
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(WATCH_EVERY)
            if over and process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left of its session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
    if over:
        raise OmniError(f"{name}: stopped after {timeout:.0f} s, its share of the time")
    if process.returncode:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        raise OmniError(f"{name} failed ({process.returncode}): {last}")
    return round(peak / 1e6) or None


def _held(pid: int) -> int:
    """Bytes that a process and its descendants hold, pages they share counted once."""
    return sum(_proportional(one) for one in _family(pid))


def _family(pid: int) -> Iterable[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from _family(int(child))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Run one stage and write what it took."""
    options = _parse()
    import preprocess  # both now, so that their time is not counted
    from omni import run as runs

    assert preprocess.prepare
    fitted = options.action in ("anchors", "export", "visualize", "dense")
    run = runs.load(options.run, options.device) if fitted else None
    before, details = _cpu_seconds(), {}
    if options.action == "dense":
        details = _dense(run, options)
    else:
        _stage(run, options)
    cpu = _cpu_seconds() - before
    stage = read_report(options.run)["stages"]["export" if details else options.action]
    record = {"seconds": stage["seconds"], "cpu_seconds": round(cpu, 2)}
    record |= {"peak_mb": stage["peak_memory_mb"]}
    if "peak_gpu_memory_mb" in stage:
        record["gpu_mb"] = stage["peak_gpu_memory_mb"]
    record |= {name: stage[name] for name in ("pairs", "steps") if name in stage} | details
    options.result.write_text(json.dumps(record))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=(*STAGES, "dense"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--config", help="preset or YAML file; default: the run's own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", help="of stages after the fit")
    parser.add_argument("--result", type=Path, required=True, help="JSON to write")
    parser.add_argument("--stride", type=int, default=1, help="of a dense export, pixels")
    parser.add_argument("--exact", action="store_true", help="the dense export of that name")
    parser.add_argument("--time", type=float, help="the only time of a dense export, frames")
    return parser.parse_args()


def _stage(run, options: argparse.Namespace) -> None:
    """Do one stage; `run` is open for those after the fit."""
    from omni import run as runs

    if options.action == "preprocess":
        runs.preprocess_video(options.video, options.run, options.config, options.set)
    elif options.action == "chains":
        runs.track(options.video, options.run, options.config, options.set)
    elif options.action == "fit":
        runs.fit(options.run, options.config, options.set)
    elif options.action == "anchors":
        runs.answer_anchors(run)
    elif options.action == "export":
        runs.export(run, options.run / "tracks.npz")
    else:
        runs.visualize(run)


def _dense(run, options: argparse.Namespace) -> dict[str, int]:
    """Export a grid of frame 0 to a file that is removed; its points and times."""
    from omni import run as runs
    from omni.maths import pixel_centers

    times = None if options.time is None else np.array([options.time], np.float32)
    with tempfile.TemporaryDirectory(dir=options.run) as folder:
        path = Path(folder) / "dense.npz"
        runs.export(
            run, path, frame=0, grid=options.stride, dense=True, exact=options.exact, times=times
        )
    grid = pixel_centers(run.store.video_size, options.stride)
    count = run.store.num_frames if times is None else len(times)
    return {"pixels": grid.shape[0] * grid.shape[1], "times": count}


def _cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
