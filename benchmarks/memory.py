"""Peak memory of exporting every pixel of a long clip with `omni export --dense`.

    python benchmarks/memory.py --frames 200 --size 480 854 --grid 1 --config default --out F.json

The run is synthetic: flows are zero and the field is untrained, which costs the same memory as any
other; `--set model.hidden=8` and the like make it faster. `--minutes` ends the export early, with
the peak until then. Reported are the peak resident size of the command (with the memory-mapped part
of the store, which the system can drop at any time), its anonymous memory alone, and the time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from omni.config import Config, load_config
from omni.field import Field, save_checkpoint
from omni.maths import processing_size
from omni.store import Store
from omni.system import to_dict, write_atomic
from preprocess.flow import schedule


def make_run(folder: Path, frames: int, size: tuple[int, int], settings: Config) -> None:
    """A preprocessed and fitted run in which nothing moves."""
    small = processing_size(size, settings.data.resolution)
    pairs = schedule(frames, settings.flow.pairs, settings.flow.max_gap)
    store, count = Store(folder), len(pairs)
    sigma = {str(abs(j - i)): [0.25, 0.6] for i, j in pairs.tolist()}
    checks = {"threshold": 1.5, "sigma": sigma, "gaps": []}
    layout = {
        "frames": ((frames, *small, 3), np.uint8, {"cuts": []}),
        "flow": ((count, *small, 2), np.int16, {"pairs": pairs.tolist(), "provider": "none"}),
        "evidence": ((count, *small), np.uint8, checks),
    }
    for name, (shape, dtype, meta) in layout.items():
        with store.stage(name, "k", {name: (shape, dtype)}, shape[0]) as stage:
            stage.meta.update(meta)
    store.note(video={"size": list(size), "fps": 24.0, "num_frames": frames})
    field = Field(frames, settings.model, settings.render)
    state = {"key": "k", "config": to_dict(settings), "num_frames": frames, "step": 0}
    save_checkpoint(folder / "checkpoint.pt", {**state, "field": field.state_dict()})
    write_atomic(folder / "report.json", b"{}")


def owned(pid: int) -> int:
    """Anonymous resident memory of a process in bytes: not mapped from a file, not swapped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Make the run, export it, print and write its memory and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 854), metavar=("H", "W"))
    parser.add_argument("--grid", type=int, default=1)
    parser.add_argument("--config", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_config(options.config, ["device=cpu", "threads=1", *options.set])
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "dense.npz"
        make_run(run, options.frames, tuple(options.size), settings)
        command = [sys.executable, "-m", "omni.cli", "export", str(run), "-o", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start, most, stop = time.monotonic(), [0], threading.Event()
        process = subprocess.Popen(
            [*command, "--dense", "--grid", str(options.grid)], env=environment
        )

        def watch() -> None:
            while not stop.wait(0.2):
                most[0] = max(most[0], owned(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            code = process.wait(options.minutes and 60 * options.minutes)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
        stop.set()
        watcher.join()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        record = {
            "frames": options.frames,
            "size": list(options.size),
            "grid": options.grid,
            "config": options.config,
            "set": options.set,
            "peak_gb": round(peak / 1e9, 2),
            "owned_gb": round(most[0] / 1e9, 2),
            "file_gb": round(out.stat().st_size / 1e9, 2) if out.exists() else None,
            "store_gb": round(sum(f.stat().st_size for f in run.glob("store/*")) / 1e9, 2),
            "seconds": round(time.monotonic() - start),
            "code": code,
        }
    print(json.dumps(record))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
