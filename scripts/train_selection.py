"""Train the candidate selection network on generated clips with exact ground truth.

    python scripts/train_selection.py --work runs/calibration

Renders, preprocesses and fits each clip as `scripts/calibrate.py` does (run that one first: the
features of candidates depend on its sigma), and writes the weights that `omni.tracking.selection`
loads, `omni/tracking/selection/network.safetensors`. The evaluation clips are not used.

Letters: N points, T frames, K candidates, F features.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from calibrate import LARGEST_ERROR, NAMED, QUANTILES, WITHIN, prepare
from safetensors.torch import save
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from omni import run as runs
from omni.config import Config, load_config
from omni.evaluation import DISTANCES
from omni.synthetic import filmed_frames
from omni.system import write_atomic
from omni.tracking import FUSED, SelectionNetwork

SHORT, LONG = 36, 80
"""frames of a clip: the best candidate near a query need not be the best far from it"""
WIDTH = 48
POINTS = 16
"""points of a step, all frames of each, each of a clip drawn for it"""
RATE, DECAY = 1e-3, 1e-4
DROPPED = 0.15
"""share of the features that are replaced by their mean, drawn for each point and step: no single
feature is equally reliable on real clips and on generated ones"""
SMALLEST_ERROR = 0.02
"""pixels at which errors are clamped from below for sigma"""

OUT = Path(__file__).resolve().parent.parent / "omni" / "tracking" / "selection"
OUT /= "network.safetensors"


@dataclass
class Clip:
    """N points of one clip in T frames.

    Attributes:
        values: (N, T, K, F) features, half precision where stored.
        valid: (N, K) bool.
        error: (N, T, K, 2) error of each candidate, pixels.
        visible: (N, T) bool.
        queried: (N, T) bool, True in the query frame of a point.
    """

    values: Tensor
    valid: Tensor
    error: Tensor
    visible: Tensor
    queried: Tensor

    def by_frame(self, point: int) -> "Clip":
        """One of the points: each of its frames as a point of a clip of one frame."""
        frames = {name: value[point, :, None] for name, value in vars(self).items()}
        return Clip(**frames | {"valid": self.valid[point].expand(len(frames["visible"]), -1)})


def main() -> None:
    """Render, fit, gather candidates, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="of each scene")
    parser.add_argument("--mixed", type=int, nargs="+", default=list(range(17, 31)), help="seeds")
    parser.add_argument("--filmed", type=int, nargs="+", default=list(range(31, 61)), help="seeds")
    parser.add_argument("--long", type=int, nargs="+", default=list(range(61, 69)), help="seeds")
    parser.add_argument("--steps", type=int, default=28000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--out", type=Path, help="default: the shipped file")
    options = parser.parse_args()
    config = load_config("cpu", options.set)
    names = []
    for scenes, seeds, *how in (
        (NAMED, options.seeds, SHORT, False),
        (["mixed"], options.mixed, SHORT, False),
        (["mixed", "walk"], options.filmed, SHORT, True),
        (["mixed", "walk", "desk"], options.long, LONG, True),
    ):
        names += [(scene, seed, *how) for seed in seeds for scene in scenes]
    clips: list[Clip] = []
    for scene, seed, frames, filmed in tqdm(names, desc="clips"):
        folder = options.work / f"{scene}-{seed}{'-filmed' * filmed}"
        prepare(folder, scene, seed, frames, config, filmed)
        clips.append(gather(folder, seed, config, filmed))
    network = train(clips, options.steps)
    write_atomic(options.out or OUT, save(network.state_dict()))


def gather(folder: Path, seed: int, config: Config, filmed: bool) -> Clip:
    """Candidates of one clip and their errors, after fitting it if need be.

    For every other point of a clip that was not filmed, features are computed from filmed frames.
    """
    runs.fit(folder / "run", config)
    with np.load(folder / "truth.npz", allow_pickle=False) as data:
        queries, truth, visible = data["queries"], data["tracks"], data["visible"]
    reader = runs.load(folder / "run", "cpu").reader
    frames, parts = reader.frames, []
    videos = [frames] if filmed else [frames, filmed_frames(frames, seed)]
    for first, video in enumerate(videos):
        reader.frames, rows = video, np.arange(first, len(queries), len(videos))
        for candidates, values in reader.candidates(queries[rows]):
            part, rows = rows[: len(values)], rows[len(values) :]
            query_frames = torch.from_numpy(np.rint(queries[part, 0]).astype(np.int64))
            queried = torch.arange(values.shape[1]) == query_frames[:, None]
            # Behind the camera a point has no position; it is occluded, so any value will do.
            target = np.where(np.isfinite(truth[part]), truth[part], candidates.xy[FUSED])
            error = torch.from_numpy((candidates.xy - target).transpose(1, 2, 0, 3)).float()
            valid, seen = torch.from_numpy(candidates.valid.T), torch.from_numpy(visible[part])
            parts.append(Clip(values.half(), valid, error, seen, queried))
    return joined(parts)


def joined(parts: list[Clip]) -> Clip:
    """The points of all parts, which have the same number of frames."""
    names = vars(parts[0])
    return Clip(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def train(clips: list[Clip], steps: int, seed: int = 0) -> SelectionNetwork:
    """Fit a network to all clips, which have equal weight.

    The learning rate is constant after a warm-up, and the result is the mean of the weights of the
    second half of the steps: it generalises better than the last ones ("Averaging Weights Leads to
    Wider Optima and Better Generalization", Izmailov et al., UAI 2018).
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = SelectionNetwork(clips[0].values.shape[-1], WIDTH)
    some = torch.cat([clip.values[::7, ::5].float().flatten(0, 2) for clip in clips])
    network.mean.copy_(some.mean(0))
    network.std.copy_(some.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 50)
    averaged = AveragedModel(network)
    bar = tqdm(range(steps), desc="steps")
    for step in bar:
        chosen = [clips[i] for i in random.choice(len(clips), POINTS)]
        points = [clip.by_frame(random.integers(len(clip.visible))) for clip in chosen]
        for point in points:
            kept = torch.rand(len(network.mean)) >= DROPPED
            point.values = torch.where(kept, point.values.float(), network.mean)
        losses = losses_of(network, joined(points))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step >= steps // 2:
            averaged.update_parameters(network)
        if step % 100 == 0:
            bar.set_postfix({name: f"{value.item():.3f}" for name, value in losses.items()})
    return averaged.module.eval()


def losses_of(network: SelectionNetwork, clip: Clip) -> dict[str, Tensor]:
    """Weighted losses: regret of the scores, and errors of the predicted confidence.

    The utility of a candidate is the share of TAP-Vid's distances within which it lies; regret is
    the utility of the best candidate minus the expected one. Candidates are compared by utility
    and not by distance, whose tail would dominate.
    """
    rows = ~clip.queried
    error, visible = clip.error[rows], clip.visible[rows]
    valid = clip.valid[:, None].expand(clip.error.shape[:3])[rows]
    # Differences of errors are those of positions: the ground truth cancels.
    score, predicted = network(clip.values[rows], valid, error)
    distance = error.norm(dim=-1)
    utility = (distance[..., None] < torch.tensor(DISTANCES)).float().mean(-1) * valid
    regret = utility.amax(-1) - (score.softmax(-1) * utility).sum(-1)
    best = score.argmax(-1, keepdim=True)
    near = (distance.gather(1, best)[:, 0] < WITHIN) & visible
    selected = error.take_along_dim(best[..., None], 1)[:, 0]
    log_error = selected.abs().clamp(SMALLEST_ERROR, LARGEST_ERROR).log()
    quantile = 0.0
    for share, times, weight in QUANTILES:
        over = log_error - predicted[:, 2:] - np.log(times)
        quantile = quantile + weight * torch.maximum(share * over, (share - 1) * over).mean(-1)
    seen = visible.float()
    return {
        "regret": 3 * (regret * seen).sum() / seen.sum(),
        "trust": F.binary_cross_entropy_with_logits(predicted[:, 0], near.float()),
        "visible": 0.3 * F.binary_cross_entropy_with_logits(predicted[:, 1], seen),
        "sigma": 0.1 * (quantile * seen).sum() / seen.sum(),
    }


if __name__ == "__main__":
    main()
