"""Training RAFT on generated pairs: losses, schedule, validation, exact resume."""

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from omni.checkpoint import load_checkpoint, save_checkpoint
from omni.errors import OmniError
from omni.store import write_atomic
from preprocess.network import SMALLEST_SIDE, FlowNetwork, Prediction
from preprocess.training.pairs import FlowPairs, PairSource

__all__ = ["VALIDATION", "RaftTrainer", "Recipe", "flow_loss", "head_losses"]

log = logging.getLogger(__name__)

DISCOUNT = 0.8
"""Weight of an update's flow against the next one's (RAFT)."""
LONGEST = 400.0
"""Pixels; longer flow is not trained on (RAFT)."""
HUBER = 4.0
"""Pixels of error beyond which sigma no longer chases an outlier."""
VALIDATION = {"gap1": 1, "gap4": 4, "gap16": 16}
"""Fixed validation sets by name: frames between the two images."""
_VALIDATION_SEED, _VALIDATION_UPDATES = 2**31 - 1, 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run."""

    variant: Literal["small", "large"] = "small"
    steps: int = 20_000
    batch: int = 16
    size: tuple[int, int] = (288, 384)
    updates: int = 12
    """recurrent updates while training"""
    rate: float = 4e-4
    """peak learning rate: 5 % of the run up, then linearly down to zero (RAFT)"""
    decay: float = 1e-5
    """weight decay (AdamW)"""
    textures: int = 400
    surfaces: int = 9
    samples: int = 6
    """rays per pixel"""
    validation: int = 32
    """pairs of each validation set, an even number"""
    seed: int = 0


def flow_loss(flows: list[Tensor], pairs: FlowPairs) -> Tensor:
    """Mean absolute error of every update's flow (B, 2, H, W), later ones weighing more.

    Pixels whose target is hidden count like all others: generated flow is exact there, too.
    Source: RAFT, equation 7.
    """
    counted = _counted(pairs)
    total = torch.zeros((), device=pairs.flow.device)
    for index, flow in enumerate(flows):
        error = (flow - pairs.flow).abs().mean(dim=1)
        weight = DISCOUNT ** (len(flows) - 1 - index)
        total = total + weight * _mean(error, counted)
    return total


def head_losses(prediction: Prediction, pairs: FlowPairs) -> tuple[Tensor, Tensor]:
    """Losses of the two heads: occlusion and log-variance `u`.

    Occlusion: cross-entropy where the target lies inside the frame; whether it does, flow says.
    Log-variance: `e^-u Huber(error) + u` on visible pixels. MFT has `u / 2`, which makes sigma the
    length of the error; ours is its standard deviation per axis, as everywhere in omni.
    """
    inside = _counted(pairs) & _target_inside(pairs)
    hidden = (~pairs.visible).float()
    occlusion = F.binary_cross_entropy_with_logits(prediction.occlusion, hidden, reduction="none")
    error = (prediction.flows[-1].detach() - pairs.flow).norm(dim=1)
    huber = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=HUBER)
    u = prediction.log_variance
    likelihood = torch.exp(-u) * huber + u
    return _mean(occlusion, inside), _mean(likelihood, inside & pairs.visible)


class RaftTrainer:
    """Trains one network; what it wrote to `folder` is continued, to the same result on a CPU.

    Leaves `checkpoint.pt` and, at every validation, `weights.safetensors` (half precision).

    Args:
        recipe: what to train.
        folder: where to save.
        device: where pairs are generated and the network lives.
        on_scalars: called with (step, name to value).

    Raises:
        OmniError: the folder holds a run of another recipe, or the images are too small.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device | str = "cpu",
        on_scalars: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    ):
        if min(recipe.size) < SMALLEST_SIDE or any(side % 8 for side in recipe.size):
            raise OmniError(
                f"training images of {recipe.size[0]}x{recipe.size[1]} do not work: both sides "
                f"must be multiples of 8 and at least {SMALLEST_SIDE}"
            )
        self.recipe, self.folder, self.device = recipe, folder, torch.device(device)
        self.on_scalars = on_scalars
        torch.manual_seed(recipe.seed)
        self.network = FlowNetwork(recipe.variant, heads=True).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), recipe.rate, weight_decay=recipe.decay
        )
        look = recipe.surfaces, recipe.samples
        self.source = PairSource(recipe.size, recipe.textures, recipe.seed, self.device, *look)
        self.step = 0
        self._stopping = False

    def run(self, validate_every: int = 1000, save_seconds: float = 120.0) -> None:
        """Train to the end, continuing what the folder holds.

        Raises:
            KeyboardInterrupt: on SIGINT or SIGTERM, after saving.
        """
        self._resume()
        steps, saved = self.recipe.steps, time.monotonic()
        bar = tqdm(total=steps, initial=self.step, desc="train", unit="step", disable=None)
        with self._stop_signals(), bar:
            if self.step == 0:
                self._validate(bar)
            while self.step < steps:
                values = self.train_step()
                bar.update()
                if self.step % 20 == 0:
                    self.on_scalars(self.step, values)
                if self.step % validate_every == 0 or self.step == steps:
                    self._validate(bar)
                    self.save()
                if self._stopping or time.monotonic() - saved > save_seconds:
                    self.save()
                    saved = time.monotonic()
                if self._stopping:
                    raise KeyboardInterrupt

    def train_step(self) -> dict[str, float]:
        """One update on the next batch; its losses by name."""
        self.network.train()
        self._freeze_batch_norm()
        pairs = self.source.batch(self.step, self.recipe.batch)
        prediction = self._predict(pairs, self.recipe.updates)
        occlusion, likelihood = head_losses(prediction, pairs)
        flow = flow_loss(prediction.flows, pairs)
        loss = flow + occlusion + likelihood
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Each on its own: the heads must not shorten the steps of the flow.
        flow_norm, heads_norm = (
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            for part in (self.network.raft, self.network.heads)
        )
        rate = self.recipe.rate * _one_cycle(self.step / self.recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(flow_norm + heads_norm):  # one broken batch must not end a run
            self.optimizer.step()
        self.step += 1
        values = {"flow": flow, "occlusion": occlusion, "likelihood": likelihood}
        return {f"loss/{name}": float(value.detach()) for name, value in values.items()} | {
            "rate": rate
        }

    @cached_property
    def _judges(self) -> PairSource:
        look = self.recipe.surfaces, self.recipe.samples
        return PairSource(self.recipe.size, 20, _VALIDATION_SEED, self.device, *look)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Scores on the fixed sets: EPE in pixels, all and visible; heads' accuracy."""
        self.network.eval()
        scores = {}
        for name, gap in VALIDATION.items():
            sums = torch.zeros(7, dtype=torch.float64)
            for index in range((self.recipe.validation + 1) // 2):
                pairs = self._judges.batch(index, 2, gap)
                sums += _sums(self._predict(pairs, _VALIDATION_UPDATES), pairs).cpu()
            error, count, seen, visible, right, inside, within = sums.tolist()
            scores[f"epe/{name}"] = error / max(count, 1)
            scores[f"epe_visible/{name}"] = seen / max(visible, 1)
            scores[f"occlusion_accuracy/{name}"] = right / max(inside, 1)
            scores[f"within_1_sigma/{name}"] = within / max(2 * visible, 1)
        return scores

    def save(self) -> None:
        """Write the checkpoint and the weights, each atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": _plain(self.recipe),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)
        # One entry only: safetensors writes several in any order.
        facts = {"training": json.dumps(_plain(self.recipe) | {"step": self.step})}
        write_atomic(self.folder / "weights.safetensors", save(self.network.weights(), facts))

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        state = load_checkpoint(path, self.device)
        if state["recipe"] != _plain(self.recipe):
            raise OmniError(
                f"{self.folder} holds a run of another recipe: give the same options or another "
                "folder"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        log.info("continuing at step %d", self.step)

    def _predict(self, pairs: FlowPairs, updates: int) -> Prediction:
        images = torch.cat([pairs.first, pairs.second]).float() / 127.5 - 1
        half = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, half):
            features, context = self.network.encode(images)
            first, second = features.chunk(2)
            return self.network(first, second, context[: len(first)], updates=updates)

    def _validate(self, bar: tqdm) -> None:
        scores = self.validate()
        self.on_scalars(self.step, scores)
        bar.set_postfix({name: f"{scores[f'epe/{name}']:.2f}" for name in VALIDATION})

    def _freeze_batch_norm(self) -> None:
        """Keep running statistics (of raft_large) from half the run on, as RAFT does."""
        if self.step > self.recipe.steps // 2:
            for module in self.network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run between two steps."""

        def stop(number, frame):
            self._stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _counted(pairs: FlowPairs) -> Tensor:
    return pairs.valid & (pairs.flow.norm(dim=1) < LONGEST)


def _target_inside(pairs: FlowPairs) -> Tensor:
    """(B, H, W) bool: the target lies in the frame, hidden or not."""
    height, width = pairs.flow.shape[-2:]
    x = pairs.flow[:, 0] + torch.arange(width, device=pairs.flow.device) + 0.5
    y = pairs.flow[:, 1] + torch.arange(height, device=pairs.flow.device)[:, None] + 0.5
    return (x >= 0) & (x <= width) & (y >= 0) & (y <= height)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def _sums(prediction: Prediction, pairs: FlowPairs) -> Tensor:
    """What validation adds up; see `RaftTrainer.validate`."""
    counted = _counted(pairs)
    visible, inside = counted & pairs.visible, counted & _target_inside(pairs)
    difference = prediction.flows[-1] - pairs.flow
    error = difference.norm(dim=1)
    right = (prediction.occlusion > 0) == ~pairs.visible
    within = difference.abs() < torch.exp(prediction.log_variance / 2)[:, None]
    parts = [
        (error * counted).sum(),
        counted.sum(),
        (error * visible).sum(),
        visible.sum(),
        (right & inside).sum(),
        inside.sum(),
        (within & visible[:, None]).sum(),
    ]
    return torch.stack([part.double() for part in parts])


def _one_cycle(fraction: float) -> float:
    """Factor on the learning rate: linearly up for 5 % of the run, then linearly down."""
    return min(fraction / 0.05 + 0.01, (1 - fraction) / 0.95, 1.0)


def _plain(recipe: Recipe) -> dict:
    values = asdict(recipe)
    return values | {"size": list(values["size"])}
