"""Train the network that weighs witnesses (`omni.consensus`), on generated clips with exact truth.

    python scripts/train_consensus.py --work runs/calibration

Renders, preprocesses and fits each clip as `scripts/calibrate.py` does (which comes first: its
sigma and confidence are part of what witnesses say), and writes `omni/consensus.safetensors`. Never
looks at the evaluation clips.

Letters: N points, T frames, W witnesses, F features.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from calibrate import LARGEST_ERROR, NAMED, QUANTILES, WITHIN, photographs, prepare
from safetensors.torch import save
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from omni import run as runs
from omni.config import Config, load_config
from omni.consensus import Consensus
from omni.files import write_atomic
from omni.metrics import DISTANCES
from omni.witnesses import PATH

SHORT, LONG = 36, 80
"""frames of a clip: what is right near a query need not be far from it"""
WIDTH = 48
POINTS = 16
"""points of a step, all frames of each, each of a clip drawn for it"""
RATE, DECAY = 1e-3, 1e-4
HIDDEN = 0.15
"""share of the features that a point does not show in a step: real clips differ from generated ones
in ways that no single feature may be relied on to survive"""
SMALLEST_ERROR = 0.02
"""pixels below which errors teach sigma nothing more"""


@dataclass
class Clip:
    """N points of one clip in T frames.

    values: (N, T, W, F), half precision where kept. valid: (N, W). off: (N, T, W, 2) error of each
    witness, pixels. visible: (N, T). asked: (N, T) True where a point was queried.
    """

    values: Tensor
    valid: Tensor
    off: Tensor
    visible: Tensor
    asked: Tensor

    def moments(self, point: int) -> "Clip":
        """One of the points: every frame of it as a point of a clip of one frame."""
        frames = {name: value[point, :, None] for name, value in vars(self).items()}
        return Clip(**frames | {"valid": self.valid[point].expand(len(frames["visible"]), -1)})


def main() -> None:
    """Render, fit, hear, train, write."""
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
    clips = []
    for scene, seed, frames, filmed in tqdm(names, desc="clips"):
        folder = options.work / f"{scene}-{seed}{'-filmed' * filmed}"
        prepare(folder, scene, seed, frames, config, filmed)
        clips.append(hear(folder, seed, config, filmed))
    network = train(clips, options.steps)
    out = options.out or Path(runs.__file__).with_name("consensus.safetensors")
    write_atomic(out, save(network.state_dict()))


def hear(folder: Path, seed: int, config: Config, filmed: bool) -> Clip:
    """What is said in one clip, and the truth about it, after fitting it if need be.

    Every other point of a clip that was not filmed sees the colours of photographs all the same.
    """
    runs.fit(folder / "run", config)
    with np.load(folder / "truth.npz", allow_pickle=False) as data:
        queries, truth, visible = data["queries"], data["tracks"], data["visible"]
    reader = runs.load(folder / "run", "cpu").reader
    own, heard = reader.frames, []
    looks = [own] if filmed else [own, photographs(own, seed)]
    for first, video in enumerate(looks):
        reader.frames, rows = video, np.arange(first, len(queries), len(looks))
        for said, values in reader.testimony(queries[rows]):
            part, rows = rows[: len(values)], rows[len(values) :]
            frames = torch.from_numpy(np.rint(queries[part, 0]).astype(np.int64))
            asked = torch.arange(values.shape[1]) == frames[:, None]
            # Behind the camera a point has no place; it is hidden, so any origin will do.
            place = np.where(np.isfinite(truth[part]), truth[part], said.xy[PATH])
            off = torch.from_numpy((said.xy - place).transpose(1, 2, 0, 3)).float()
            valid, seen = torch.from_numpy(said.valid.T), torch.from_numpy(visible[part])
            heard.append(Clip(values.half(), valid, off, seen, asked))
    return together(heard)


def together(parts: list[Clip]) -> Clip:
    """The points of all parts, which have as many frames."""
    names = vars(parts[0])
    return Clip(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def train(clips: list[Clip], steps: int, seed: int = 0) -> Consensus:
    """Fit a network to all clips, which count alike.

    The rate is held, and the result is the mean of the weights of the second half: it generalises
    better than one of them ("Averaging Weights Leads to Wider Optima and Better Generalization",
    Izmailov et al., UAI 2018).
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = Consensus(clips[0].values.shape[-1], WIDTH)
    some = torch.cat([clip.values[::7, ::5].float().flatten(0, 2) for clip in clips])
    network.mean.copy_(some.mean(0))
    network.spread.copy_(some.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 50)
    averaged = AveragedModel(network)
    bar = tqdm(range(steps), desc="steps")
    for step in bar:
        chosen = [clips[i] for i in random.choice(len(clips), POINTS)]
        points = [clip.moments(random.integers(len(clip.visible))) for clip in chosen]
        for point in points:
            shown = torch.rand(len(network.mean)) >= HIDDEN
            point.values = torch.where(shown, point.values.float(), network.mean)
        losses = losses_of(network, together(points))
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


def losses_of(network: Consensus, clip: Clip) -> dict[str, Tensor]:
    """Weighted losses: regret of the weights, and how well the result is judged.

    Regret is what the expected share of TAP-Vid's distances within which a witness is falls short
    of the best witness's; witnesses are told apart by it, not by distance, whose tail would rule.
    """
    rows = ~clip.asked
    off, visible = clip.off[rows], clip.visible[rows]
    valid = clip.valid[:, None].expand(clip.off.shape[:3])[rows]
    # Truth cancels in differences of errors, which are those of the places.
    score, judged = network(clip.values[rows], valid, off)
    error = off.norm(dim=-1)
    worth = (error[..., None] < torch.tensor(DISTANCES)).float().mean(-1) * valid
    regret = worth.amax(-1) - (score.softmax(-1) * worth).sum(-1)
    best = score.argmax(-1, keepdim=True)
    near = (error.gather(1, best)[:, 0] < WITHIN) & visible
    size = (
        off.take_along_dim(best[..., None], 1)[:, 0]
        .abs()
        .clamp(SMALLEST_ERROR, LARGEST_ERROR)
        .log()
    )
    surprise = 0.0
    for share, times, weight in QUANTILES:
        over = size - judged[:, 2:] - np.log(times)
        surprise = surprise + weight * torch.maximum(share * over, (share - 1) * over).mean(-1)
    seen = visible.float()
    return {
        "regret": 3 * (regret * seen).sum() / seen.sum(),
        "trust": F.binary_cross_entropy_with_logits(judged[:, 0], near.float()),
        "visible": 0.3 * F.binary_cross_entropy_with_logits(judged[:, 1], seen),
        "sigma": 0.1 * (surprise * seen).sum() / seen.sum(),
    }


if __name__ == "__main__":
    main()
