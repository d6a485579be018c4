"""Time that our fit needs to reach the accuracy of the paper's configuration after a given time.

    python benchmarks/time_to_accuracy.py ../shared/data/synthetic/dev/tumble.npz --minutes 60 \
        -o time_to_accuracy.json

Both fits use the same flows, run one after the other in one process, and are scored by delta_avg
of the field alone: no chains, no fusion, no smoothing. The paper's batch is reduced so that its
schedule fits into the time. Arithmetic per ray is that of one training step (forward and backward)
by PyTorch's FLOP counter, divided by the rays of its batch.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from ablation import field_alone
from quality import Clip, find_clips, prepared
from record import machine, write_record
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from omni.config import Config, load_config
from omni.errors import OmniError
from omni.evaluation import evaluate, queries
from omni.field import Trainer
from omni.run import make_trainer
from omni.store import Store
from omni.tracking import Reader

PROBE = 10
"""Steps from which the speed of the paper's configuration is estimated."""


def main() -> None:
    """Count, fit the paper's configuration for a while, then ours until it is as good."""
    options = parse()
    torch.set_num_threads(options.threads)
    clip = find_clips([options.clip], options.runs)[0]
    ours = load_config(options.config, [f"threads={options.threads}", *options.set])
    store = Store.open(prepared(clip, options.runs, ours))
    paper = load_config(
        "paper", ["flow.pairs=log", "sampling.pairs=8", f"sampling.points={options.points}"]
    )
    flops = {name: flops_per_ray(store, config) for name, config in both(ours, paper)}
    limit = 60 * options.minutes
    goal = last(curve(store, with_steps(store, paper, options.minutes), clip, limit, limit / 4))
    reached = []
    for seconds, step, score in curve(store, ours, clip, limit, 1.0):
        reached.append({"seconds": round(seconds, 2), "step": step, "delta_avg": score})
        if score >= goal["delta_avg"]:
            break
    enough = reached[-1]["delta_avg"] >= goal["delta_avg"]
    record = {
        "machine": machine() | {"threads": options.threads},
        "clip": clip.name,
        "paper": goal,
        "ours": reached,
        "time_ratio": round(goal["seconds"] / reached[-1]["seconds"], 1) if enough else None,
        "flops_per_ray": flops,
        "flops_ratio": round(flops["paper"] / flops["ours"], 1),
    }
    print(table(record))
    if options.out:
        write_record(options.out, **record)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="of the paper's fit")
    parser.add_argument("--points", type=int, default=4, help="per frame pair, of the paper's fit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", default="cpu", help="ours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    return parser.parse_args()


def both(ours: Config, paper: Config) -> tuple[tuple[str, Config], tuple[str, Config]]:
    """Both configurations by name."""
    return ("ours", ours), ("paper", paper)


def flops_per_ray(store: Store, config: Config) -> float:
    """Floating-point operations of one training step per ray of its batch."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(store, config, Path(folder) / "none.pt", torch.device("cpu"))
        trainer.field.train()
        with FlopCounterMode(display=False) as counter:
            trainer.train_step()
    return counter.get_total_flops() / (config.sampling.pairs * config.sampling.points)


def with_steps(store: Store, paper: Config, minutes: float) -> Config:
    """The paper's configuration with as many steps as the time allows, from a few of them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(store, paper, Path(folder) / "none.pt", torch.device("cpu"))
        trainer.train_step()
        start = time.perf_counter()
        for _ in range(PROBE):
            trainer.train_step()
        each = (time.perf_counter() - start) / PROBE
    steps = max(1, int(60 * minutes / each))
    return dataclasses.replace(paper, optim=dataclasses.replace(paper.optim, steps=steps))


def curve(
    store: Store, config: Config, clip: Clip, limit: float, wait: float
) -> Iterator[tuple[float, int, float]]:
    """Seconds of fitting, step and delta_avg of the field alone, ever less often, and at the end.

    The seconds count setting up and fitting, not evaluation. `wait` are those before the first one.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(store, config, Path(folder) / "none.pt", torch.device("cpu"))
        used = evaluated = time.perf_counter() - start
        with tqdm(total=config.optim.steps, disable=None) as bar:
            while trainer.step < config.optim.steps and used < limit:
                start = time.perf_counter()
                trainer.train_step()
                trainer.step += 1
                used += time.perf_counter() - start
                bar.update()
                if used - evaluated > wait:
                    yield used, trainer.step, accuracy(store, trainer, clip)
                    evaluated, wait = used, 1.3 * wait
        yield used, trainer.step, accuracy(store, trainer, clip)


def accuracy(store: Store, trainer: Trainer, clip: Clip) -> float:
    """delta_avg of the field alone."""
    points = queries(clip.truth, "given").query_points.astype(np.float32)
    field = trainer.field.eval()
    tracks = field_alone(Reader(store, field, 8192), points)
    field.train()
    return evaluate(tracks, clip.truth, "given")["delta_avg"]


def last(points: Iterator[tuple[float, int, float]]) -> dict[str, float]:
    """The end of a curve with the best score along it, which counts as its accuracy."""
    every = list(points)
    seconds, step, _ = every[-1]
    return {"seconds": round(seconds, 1), "step": step, "delta_avg": max(p[2] for p in every)}


def table(record: dict) -> str:
    """A short Markdown table of the record."""
    paper, ours = record["paper"], record["ours"][-1]
    lines = ["| | seconds | steps | delta_avg | GFLOP per ray |", "|---|---|---|---|---|"]
    for name, row in (("paper", paper), ("ours", ours)):
        flops = record["flops_per_ray"][name] / 1e9
        score = 100 * row["delta_avg"]
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['step']} | {score:.1f} | {flops:.4f} |"
        )
    lines.append(f"\ntime ratio {record['time_ratio']}, arithmetic ratio {record['flops_ratio']}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"time_to_accuracy: {error}")
