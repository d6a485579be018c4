"""Accuracy of dense flow: end-point errors of the providers side by side, and the JSON behind it.

    python benchmarks/flow.py --data ../shared/data --weights raft_small.pth -o flow.json

Sets: `generated` and `blur` (random scenes of `omni.synthetic`, of seeds that nothing is trained
on, with the effects of a camera and a codec; `blur` with a wide open shutter), `dev` (the clips of
DATA/synthetic/dev), `kitti` (DATA/flow/kitti_pair.npz). Far flows start from composed near ones,
as in `preprocess`; sigma is that of its evidence.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from record import write_record
from tqdm import tqdm

from omni.errors import OmniError
from omni.maths import decode_flow, grid_queries, pixel_centers
from omni.store import Store
from omni.synthetic import filmed_frames, make_clip
from omni.tracking import read_arrays, sample_flow
from preprocess.evidence import NOISE, assess, calibrated
from preprocess.flow import (
    DisFlow,
    FlowProvider,
    Weights,
    compute_flows,
    find_weights,
    halfway,
)
from preprocess.flow.gmflow import GmFlow
from preprocess.flow.raft import RaftFlow
from preprocess.parallel import worker_count

SETS = ("generated", "blur", "dev", "kitti")
SCENES = ("mixed", "walk", "desk")
"""Random scenes of the generated sets, taken in turn."""
SEED = 9001
"""Of the first scene; calibration and training use none from here on."""
SHUTTER = 0.9
"""Fraction of a frame that the shutter is open in the set `blur`."""
LAST = 16
"""Longest gap of the generated sets."""
NEAR_BORDER = 8
"""pixels around a motion border"""
JUMP = 0.5
"""pixels by which the flow of neighbouring pixels differs across a motion border"""
THRESHOLD = 1.5
"""pixels, `flow.cycle_threshold`"""
DISPLACEMENTS = (0, 2, 10, 40, math.inf)


@dataclass(frozen=True)
class Truth:
    """True motion of N points from frame `source` to frame `target`.

    xy, flow: (N, 2) raster pixels and pixels. visible, border: (N,) bool; the point is visible in
    the target; it is within 8 pixels of a motion border. border is None where that is not known.
    """

    source: int
    target: int
    xy: np.ndarray
    flow: np.ndarray
    visible: np.ndarray
    border: np.ndarray | None


@dataclass(frozen=True)
class Clip:
    """Frames (T, H, W, 3) uint8 and their true motion."""

    frames: np.ndarray
    truths: list[Truth]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every provider on every set; print a table per set and write the JSON."""
    options = parse(arguments)
    providers = find_providers(options)
    results = {}
    for name in options.sets:
        clips = list(load_set(name, options))
        results[name] = {
            label: score(clips, provider, f"{name} {label}")
            for label, provider in providers.items()
        }
        print(table(name, results[name]), flush=True)
    if options.out:
        names = {label: provider.name for label, provider in providers.items()}
        write_record(options.out, providers=names, results=results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        OmniError: fewer than one scene, or a CUDA device that does not exist.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="of dev and kitti"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+", choices=("dis", "gmflow", "mixed"), default=["dis"])
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="of RAFT")
    parser.add_argument("--raft", choices=("small", "large"), default="small", help="of --weights")
    parser.add_argument("--scenes", type=int, default=12, help="scenes of a generated set")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="of generated frames")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        raise OmniError("--scenes must be at least 1; --sets chooses what is measured")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise OmniError("no CUDA device is available: use --device cpu, or a CUDA build of torch")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def find_providers(options: argparse.Namespace) -> dict[str, FlowProvider]:
    """Those without an option of their own, and RAFT with each of the given weights."""
    providers: dict[str, FlowProvider] = {}
    if "dis" in options.methods:
        providers["dis"] = DisFlow(worker_count(options.threads))
    if "gmflow" in options.methods:
        providers["gmflow"] = GmFlow(find_weights("gmflow"), options.device)
    if "mixed" in options.methods:
        coarse = GmFlow(find_weights("gmflow"), options.device, refine=False)
        providers["mixed"] = DisFlow(worker_count(options.threads), coarse)
    short = [f"{path.parent.name}/{path.stem}" for path in options.weights]
    for path, label in zip(options.weights, short, strict=True):
        label = f"raft {label if short.count(label) == 1 else path}"
        providers[label] = RaftFlow(Weights(path, f"raft-{options.raft}", "given"), options.device)
    return providers


def load_set(name: str, options: argparse.Namespace) -> Iterator[Clip]:
    """The clips of a set.

    Raises:
        OmniError: its files are missing.
    """
    if name in ("generated", "blur"):
        for index in range(options.scenes):
            yield generate(index, tuple(options.size), SHUTTER if name == "blur" else None)
    elif name == "kitti":
        yield load_kitti(options.data / "flow" / "kitti_pair.npz")
    else:
        paths = sorted((options.data / "synthetic" / "dev").glob("*.npz"))
        if not paths:
            raise OmniError(
                f"no clips in {options.data}/synthetic/dev: give their folder as --data"
            )
        yield from map(load_dev, paths)


def generate(index: int, size: tuple[int, int], shutter: float | None) -> Clip:
    """Scene `index` in `LAST` + 1 frames of `size` (H, W); true motion of frame 0's pixels."""
    seed = SEED + index
    clip = make_clip(SCENES[index % len(SCENES)], LAST + 1, size, seed, shutter)
    centers = pixel_centers(size)
    tracks, visible = clip.track(grid_queries(size, 0, 1))
    tracks, visible = tracks.reshape(*size, -1, 2), visible.reshape(*size, -1)
    truths = []
    for gap in (1, 2, 4, 8, LAST):
        flow = (tracks[:, :, gap] - centers).astype(np.float32)
        border = near_border(flow, clip.segmentation[0])
        known = np.isfinite(flow).all(-1)  # NaN: behind the camera
        truths.append(_dense(0, gap, flow, visible[:, :, gap], known, border))
    return Clip(filmed_frames(clip.video, seed), truths)


def load_dev(path: Path) -> Clip:
    """A synthetic clip: every 9th adjacent flow, and tracks of frame 0 for the longer gaps."""
    names = ("video", "flow_fwd", "flow_valid", "dense_query", "dense_tracks", "dense_visible")
    data = read_arrays(path, names)
    forward = data["flow_fwd"].astype(np.float32)
    borders = {t: near_border(forward[t]) for t in range(0, len(forward), 9)}
    everywhere = np.ones(forward.shape[1:3], bool)
    truths = [
        _dense(t, t + 1, forward[t], data["flow_valid"][t], everywhere, border)
        for t, border in borders.items()
    ]
    xy = data["dense_query"][:, :0:-1].astype(np.float32)
    column, row = xy.astype(int).T
    for gap in (2, 4, 8, 16, 32):
        if gap < len(data["video"]):
            flow = data["dense_tracks"][:, gap].astype(np.float32) - xy
            known = np.isfinite(flow).all(-1)
            parts = xy, flow, data["dense_visible"][:, gap], borders[0][row, column]
            truths.append(Truth(0, gap, *(part[known] for part in parts)))
    return Clip(data["video"], truths)


def load_kitti(path: Path) -> Clip:
    """The real pair: laser-measured points, borders unknown; visible means inside the frame."""
    data = read_arrays(path, ("image1", "image2", "flow", "valid", "inside"))
    truth = _dense(0, 1, data["flow"], data["inside"], data["valid"], None)
    return Clip(np.stack([data["image1"], data["image2"]]), [truth])


def near_border(flow: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """(H, W) bool: within 8 pixels of where flow (H, W, 2) jumps, and labels (H, W) differ."""
    edge = np.zeros(flow.shape[:2], np.uint8)
    for axis in (0, 1):
        jump = np.linalg.norm(np.diff(flow, axis=axis), axis=-1) > JUMP
        if labels is not None:
            jump &= np.diff(labels, axis=axis) != 0
        edge[: jump.shape[0], : jump.shape[1]] |= jump
    side = 2 * NEAR_BORDER + 1
    return cv2.dilate(edge, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))) > 0


def _dense(source, target, flow, visible, known, border):
    xy = pixel_centers(flow.shape[:2])
    border = None if border is None else border[known]
    return Truth(source, target, xy[known], flow[known], visible[known], border)


def score(clips: Sequence[Clip], provider: FlowProvider, title: str) -> dict[str, dict]:
    """Scores of a provider on a set by group of points, its sigma and its seconds per pair."""
    parts, seconds, count = [], 0.0, 0
    for clip in tqdm(clips, desc=title, disable=None):
        pairs = needed(clip.truths)
        with tempfile.TemporaryDirectory() as folder:
            flow, evidence, spent = estimate(clip.frames, pairs, provider, Path(folder))
        seconds, count = seconds + spent, count + len(pairs)
        for truth in clip.truths:
            k = pairs.tolist().index([truth.source, truth.target])
            parts.append(compare(truth, flow[k], evidence(k), provider.name))
    points = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores = {name: errors(points["error"][chosen]) for name, chosen in groups(points).items()}
    inside = np.abs(points["difference"]) / points["sigma"][:, None]
    inside = inside[points["visible"]]
    scores["sigma"] = {f"within_{n}": float((inside < n).mean()) for n in (1, 2)}
    scores["time"] = {"seconds_per_pair": round(seconds / count, 4), "pairs": count}
    return scores


def needed(truths: Sequence[Truth]) -> np.ndarray:
    """(K, 2) pairs to compute, near first: the true ones, their reverses, and halves of all."""
    found, pending = set(), [(truth.source, truth.target) for truth in truths]
    while pending:
        source, target = pending.pop()
        if (source, target) in found:
            continue
        found.add((source, target))
        pending.append((target, source))
        middle = halfway(source, target)
        if middle != source:
            pending += [(source, middle), (middle, target)]
    return np.array(sorted(found, key=lambda pair: (abs(pair[1] - pair[0]), pair)))


def estimate(frames: np.ndarray, pairs: np.ndarray, provider: FlowProvider, folder: Path):
    """Flow (K, h, w, 2) of `pairs`, a function from k to its evidence, and the seconds it took."""
    shape = (len(pairs), *frames.shape[1:3])
    arrays = {"flow": ((*shape, 2), np.int16)}
    store = Store(folder)
    with store.stage("flow", "benchmark", arrays, len(pairs)) as stage:
        start = time.perf_counter()
        compute_flows(frames, pairs, provider, stage, tqdm(disable=True))
        seconds = time.perf_counter() - start
    flow = decode_flow(np.array(store.flow))
    index = {tuple(pair): k for k, pair in enumerate(pairs.tolist())}

    def evidence(k: int):
        reverse = index[tuple(pairs[k, ::-1].tolist())]
        return assess(flow[k], flow[reverse], THRESHOLD)

    return flow, evidence, seconds


def compare(truth: Truth, flow: np.ndarray, evidence, name: str) -> dict[str, np.ndarray]:
    """Errors, sigma and groups of every point of one pair, as arrays (N, ...)."""
    difference = sample_flow(flow, truth.xy) - truth.flow
    column, row = truth.xy.astype(int).T
    count, distance = len(difference), abs(truth.target - truth.source)
    floor, slope, _ = calibrated(name, [distance])[distance]
    unknown = np.zeros(count, bool)
    return {
        "difference": difference,
        "error": np.linalg.norm(difference, axis=-1),
        "length": np.linalg.norm(truth.flow, axis=-1),
        "gap": np.full(count, distance, np.int16),
        "visible": truth.visible,
        "border": unknown if truth.border is None else truth.border,
        "sigma": floor + NOISE + slope * evidence.error[row, column],
    }


def groups(points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The groups of points that are scored, by name, as masks; empty ones are left out."""
    visible, gap, length = points["visible"], points["gap"], points["length"]
    found = {"all": np.ones(len(gap), bool), "visible": visible, "hidden": ~visible}
    found["near motion borders"] = points["border"]
    found |= {f"gap {value}": gap == value for value in np.unique(gap)}
    for low, high in zip(DISPLACEMENTS, DISPLACEMENTS[1:], strict=False):
        found[f"{low} to {high} px"] = (length >= low) & (length < high)
    return {name: chosen for name, chosen in found.items() if chosen.any()}


def errors(error: np.ndarray) -> dict[str, float]:
    """Mean and median end-point error in pixels; shares beyond 1 and 3 pixels."""
    return {
        "points": len(error),
        "mean": float(error.mean(dtype=np.float64)),
        "median": float(np.median(error)),
        "outliers_1px": float((error > 1).mean()),
        "outliers_3px": float((error > 3).mean()),
    }


def table(name: str, results: dict[str, dict]) -> str:
    """Lay out one set as Markdown: EPE mean / median / % over 1 px / % over 3 px."""
    labels = list(results)
    lines = [f"| {name} | {' | '.join(labels)} |", "|---" * (1 + len(labels)) + "|"]
    for group in next(iter(results.values())):
        cells = [_cell(results[label][group]) for label in labels]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(values: dict) -> str:
    if "mean" in values:
        shares = f"{100 * values['outliers_1px']:.1f} / {100 * values['outliers_3px']:.1f}"
        return f"{values['mean']:.3f} / {values['median']:.3f} / {shares}"
    if "within_1" in values:
        return f"{100 * values['within_1']:.0f} % in 1, {100 * values['within_2']:.0f} % in 2"
    return f"{1000 * values['seconds_per_pair']:.0f} ms"


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"flow: {error}")
