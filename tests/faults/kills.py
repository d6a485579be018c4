"""Kill `omni optimize` at random moments of every stage, run it again, compare its results.

    python tests/faults/kills.py --kills 30 [--seed 0] [--out kills.json]

Every kill gets a run folder of its own. The stages take turns; the moment within a stage and the
signal (SIGKILL every other time, else SIGINT, SIGTERM or SIGUSR1) are random. A trial counts where
the second command ends well, tracks and views are byte for byte those of an uninterrupted run, and
no temporary file is left.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image

OMNI = [sys.executable, "-m", "omni.cli"]
SETTINGS = [
    f"--set={setting}"
    for setting in (
        "optim.steps=240",
        "optim.evaluate_every=60",
        "optim.log_every=20",
        "optim.image_every=100",
        "optim.checkpoint_seconds=0.3",
        "sampling.pairs=16",
        "model.hidden=32",
        "threads=1",
        "flow.workers=1",
        "output.grid=8",
        "output.render_side=32",
        "output.render_frames=4",
    )
]
RESULTS = ["chains.npz", "tracks.npz", "overlay.mp4", "color.mp4", "depth.mp4"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def write_clip(folder, frames=8):
    """A texture that moves 2 px right and 1 px down per frame, as PNG files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((128, 96), Image.Resampling.BICUBIC))
    for t in range(frames):
        x, y = 24 - 2 * t, 12 - t
        iio.imwrite(folder / f"{t:03d}.png", texture[y : y + 64, x : x + 96])
    return folder


def fitted(run):
    try:
        return "fit" in json.loads((run / "report.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return False


BEGINS = {
    "start": lambda run: True,
    "frames": lambda run: (run / "config.yaml").exists(),
    "flow": lambda run: (run / "store" / "flow.partial.npy").exists(),
    "evidence": lambda run: (run / "store" / "evidence.partial.npy").exists(),
    "chains": lambda run: (run / "store" / "evidence.npy").exists(),
    "fit": lambda run: (run / "chains.npz").exists(),
    "export": fitted,
    "visualize": lambda run: (run / "tracks.npz").exists(),
}
"""What shows in a run folder that a stage has begun; in order."""


def command(clip, run):
    return [*OMNI, "optimize", str(clip), "-o", str(run), "--config", "cpu", *SETTINGS]


def again(clip, run, *more):
    """Run the command to its end."""
    done = [*command(clip, run), *more]
    return subprocess.run(done, capture_output=True, text=True, timeout=600)


def start(clip, run):
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command(clip, run), stdout=quiet, stderr=subprocess.PIPE, text=True)


def time_stages(clip, run):
    """Run to the end; seconds that each stage took."""
    process, begun = start(clip, run), {}
    while process.poll() is None:
        for stage, begins in BEGINS.items():
            if stage not in begun and begins(run):
                begun[stage] = time.monotonic()
        time.sleep(0.002)
    assert process.returncode == 0, process.stderr.read()
    times = [*begun.values(), time.monotonic()]
    return {stage: times[i + 1] - times[i] for i, stage in enumerate(begun)}


def kill_once(clip, run, stage, delay, number):
    """Start, kill `delay` seconds into a stage; whether it came before the end, and its output"""
    process = start(clip, run)
    while process.poll() is None and not BEGINS[stage](run):
        time.sleep(0.002)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, output = process.communicate(timeout=120)
    return process.returncode != 0, output


def trial(clip, run, stage, seconds, number, rng):
    """Kill a fresh run inside of `stage`, continue it; a record of what happened."""
    while True:
        delay = rng.uniform(0, 0.95 * seconds)
        killed, output = kill_once(clip, run, stage, delay, number)
        if killed:
            break
        subprocess.run(["rm", "-r", str(run)], check=True)
        seconds *= 0.7  # the machine is faster than when it was measured
    reached = [name for name, begins in BEGINS.items() if begins(run)][-1]
    result = again(clip, run)
    return {
        "stage": stage,
        "reached": reached,
        "signal": signal.Signals(number).name,
        "delay": round(delay, 3),
        "output": output.strip().splitlines()[-1:] or [""],
        "code": result.returncode,
        "error": result.stderr[-500:] if result.returncode else "",
        "left": sorted(p.name for p in run.rglob("*") if ".tmp" in p.name or "partial" in p.name),
    }


def same_file(path, other):
    return path.is_file() and path.read_bytes() == other.read_bytes()


def kill_all(folder, kills, seed=0, stages=tuple(BEGINS)):
    """`kills` trials; yields each one's record, with whether its results are the same bytes."""
    rng = random.Random(seed)
    clip = write_clip(folder / "frames")
    seconds = time_stages(clip, folder / "reference")
    for index in range(kills):
        stage = stages[index % len(stages)]
        number = signal.SIGKILL if index // len(stages) % 2 == 0 else rng.choice(SIGNALS)
        run = folder / f"run{index}"
        record = trial(clip, run, stage, seconds[stage], number, rng)
        record["differ"] = [
            name for name in RESULTS if not same_file(run / name, folder / "reference" / name)
        ]
        record["same"] = not (record["code"] or record["differ"] or record["left"])
        yield record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for record in kill_all(Path(folder), options.kills, options.seed):
            records.append(record)
            result = "same bytes" if record["same"] else "DIFFERS"
            where = f"{record['delay']:6.2f} s into {record['stage']:9}"
            trouble = [record[name] for name in ("error", "differ", "left") if record[name]]
            print(f"{len(records):3} {record['signal']:8} {where} {result}", *trouble)
            sys.stdout.flush()
    same = sum(record["same"] for record in records)
    print(f"{same} of {len(records)} runs continued to the same bytes")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1))
    sys.exit(same != len(records))


if __name__ == "__main__":
    main()
