"""Training RAFT on generated pairs: losses, schedule, validation, exact resume."""

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from omni.errors import OmniError
from omni.field import load_checkpoint, save_checkpoint
from omni.system import Interrupted, stop_signals, write_atomic
from preprocess.flow.raft import SMALLEST_SIDE, FlowNetwork, Prediction
from preprocess.training.pairs import FlowPairs, PairSource

__all__ = ["VALIDATION", "RaftTrainer", "Recipe", "flow_loss", "head_losses"]

log = logging.getLogger(__name__)

DISCOUNT = 0.8
"""Weight of an update's flow against the next one's (RAFT)."""
LONGEST = 400.0
"""Pixels; longer flow is not trained on (RAFT)."""
HUBER = 4.0
"""Pixels of error beyond which the loss of sigma is linear, so that outliers weigh less."""
VALIDATION = {"gap1": 1, "gap4": 4, "gap16": 16}
"""Fixed validation sets by name: frames between the two images."""
_VALIDATION_SEED, _VALIDATION_UPDATES = 2**31 - 1, 20
_LOG_EVERY = 20  # steps

Report = Callable[[int, dict[str, float]], None]
"""Called with a step and its values by name."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run.

    Raises:
        OmniError: a value that training cannot work with.
    """

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
    """pairs of each validation set, rounded up to an even number"""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "updates": 1, "textures": 1, "samples": 1, "validation": 1}
        for name, bound in (least | {"surfaces": 4, "seed": 0}).items():
            if getattr(self, name) < bound:
                raise OmniError(f"{name} = {getattr(self, name)} is too small: at least {bound}")
        if self.seed >= 2**31 - 2:
            raise OmniError(f"seed = {self.seed} is too large: validation and benchmark use others")
        if not (0 < self.rate <= 1 and 0 <= self.decay <= 1):
            raise OmniError(f"rate = {self.rate} or decay = {self.decay} is not between 0 and 1")
        if self.variant not in ("small", "large"):
            raise OmniError(f"variant {self.variant!r} is not one of small, large")
        if min(self.size) < SMALLEST_SIDE or any(side % 8 for side in self.size):
            raise OmniError(
                f"training images of {self.size[0]}x{self.size[1]} do not work: both sides must "
                f"be multiples of 8 and at least {SMALLEST_SIDE}"
            )


def flow_loss(flows: list[Tensor], pairs: FlowPairs) -> Tensor:
    """Mean absolute error of every update's flow (B, 2, H, W), later ones weighing more.

    Pixels whose target is occluded count like all others: generated flow is exact there, too.

    Args:
        flows: of every recurrent update, in order.
        pairs: ground truth.

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

    Occlusion: cross-entropy where the target lies inside the frame, which follows from the flow.
    Log-variance: `e^-u Huber(error) + u` on visible pixels. MFT has `u / 2`, which makes sigma the
    length of the error; ours is its standard deviation per axis, as everywhere in omni.
    """
    assert prediction.occlusion is not None and prediction.log_variance is not None
    inside = _counted(pairs) & _target_inside(pairs)
    hidden = (~pairs.visible).float()
    occlusion = F.binary_cross_entropy_with_logits(prediction.occlusion, hidden, reduction="none")
    error = (prediction.flows[-1].detach() - pairs.flow).norm(dim=1)
    huber = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=HUBER)
    u = prediction.log_variance
    likelihood = torch.exp(-u) * huber + u
    return _mean(occlusion, inside), _mean(likelihood, inside & pairs.visible)


class RaftTrainer:
    """Trains one network; a run in `folder` is continued, on a CPU to the same result.

    Leaves `checkpoint.pt` and `weights.safetensors` (half precision).

    Args:
        recipe: network, data and schedule.
        folder: of the checkpoint, which is continued if there is one.
        device: where pairs are generated and the network lives.

    Raises:
        OmniError: the folder holds a run of another recipe, or a damaged or foreign checkpoint.
    """

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device | str = "cpu"):
        self.recipe, self.folder, self.device = recipe, folder, torch.device(device)
        torch.manual_seed(recipe.seed)
        self.network = FlowNetwork(recipe.variant, heads=True).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), recipe.rate, weight_decay=recipe.decay
        )
        self.step = 0
        self._stop_signal: int | None = None
        self._resume()  # before the textures, which take a while
        self.source = self._pair_source(recipe.textures, recipe.seed)

    def _pair_source(self, textures: int, seed: int) -> PairSource:
        recipe = self.recipe
        shown = recipe.surfaces, recipe.samples
        return PairSource(recipe.size, textures, seed, self.device, *shown)

    def run(
        self,
        report: Report = lambda step, values: None,
        validate_every: int = 1000,
        save_seconds: float = 120.0,
    ) -> None:
        """Train to the end.

        Args:
            report: called with the losses every 20 steps, and at every validation its scores and
                `seconds_per_step`, the median of the training steps since the last one.
            validate_every: steps between validations; there is one before and after all, too.
            save_seconds: between checkpoints; every validation has one, too.

        Raises:
            Interrupted: on a stop signal, after saving.
            OmniError: the folder cannot be written.
        """
        steps, saved = self.recipe.steps, time.monotonic()
        seconds: list[float] = []
        bar = tqdm(total=steps, initial=self.step, desc="train", unit="step", disable=None)
        with stop_signals(self._note_signal), bar:
            if self.step == 0:
                self._validate(bar, report, seconds)
            while self.step < steps:
                began = time.monotonic()
                losses = self.train_step()
                seconds.append(time.monotonic() - began)
                bar.update()
                if self.step % _LOG_EVERY == 0:
                    report(self.step, {name: float(value) for name, value in losses.items()})
                validating = self.step % validate_every == 0 or self.step == steps
                if validating:
                    self._validate(bar, report, seconds)
                    seconds.clear()
                stop_signal = self._stop_signal
                stopping = stop_signal is not None
                if validating or stopping or time.monotonic() - saved > save_seconds:
                    self.save()
                    saved = time.monotonic()
                if stop_signal is not None:
                    raise Interrupted(stop_signal)

    def _note_signal(self, number: int, frame: object) -> None:
        """Stop after the current step."""
        self._stop_signal = number

    def train_step(self) -> dict[str, Tensor | float]:
        """One update on the next batch; its losses by name, on the device, and the rate."""
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
        assert self.network.heads is not None
        flow_norm, heads_norm = (
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            for part in (self.network.raft, self.network.heads)
        )
        rate = self.recipe.rate * _one_cycle(self.step / self.recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(flow_norm + heads_norm):  # one broken batch must not end a run
            self.optimizer.step()
        else:
            log.warning("step %d: gradient not finite, batch left out", self.step)
        self.step += 1
        losses = {"flow": flow, "occlusion": occlusion, "likelihood": likelihood}
        return {f"loss/{n}": value.detach() for n, value in losses.items()} | {"rate": rate}

    @cached_property
    def _validation_source(self) -> PairSource:
        return self._pair_source(20, _VALIDATION_SEED)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Scores on the fixed sets: EPE in pixels, all and visible; heads' accuracy."""
        self.network.eval()
        scores = {}
        for name, gap in VALIDATION.items():
            sums = torch.zeros(7, dtype=torch.float64)
            for index in range((self.recipe.validation + 1) // 2):
                pairs = self._validation_source.batch(index, 2, gap)
                sums += _sums(self._predict(pairs, _VALIDATION_UPDATES), pairs).cpu()
            error, count, visible_error, visible, correct, inside, within = sums.tolist()
            scores[f"epe/{name}"] = error / max(count, 1)
            scores[f"epe_visible/{name}"] = visible_error / max(visible, 1)
            scores[f"occlusion_accuracy/{name}"] = correct / max(inside, 1)
            scores[f"within_1_sigma/{name}"] = within / max(2 * visible, 1)
        return scores

    def save(self) -> None:
        """Write the weights and the checkpoint, each atomically.

        In this order: where the checkpoint is finished, so are the weights.

        Raises:
            OmniError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # One entry only: safetensors writes several in any order.
        facts = {"training": json.dumps(_plain(self.recipe) | {"step": self.step})}
        write_atomic(self.folder / "weights.safetensors", save(self.network.weights(), facts))
        state = {
            "recipe": _plain(self.recipe),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        advice = "delete it to start anew, or give another folder"
        try:
            state = load_checkpoint(path)  # on the CPU, where AdamW counts its steps
        except OmniError as error:
            raise OmniError(f"{str(error).partition(': ')[0]}: {advice}") from None
        if state.get("recipe") != _plain(self.recipe):
            what = "a run of another recipe" if "recipe" in state else "something else's checkpoint"
            raise OmniError(f"{self.folder} holds {what}: give the same options or another folder")
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError):
            raise OmniError(f"{path} does not fit itself: {advice}") from None
        log.info("continuing at step %d", self.step)

    def _predict(self, pairs: FlowPairs, updates: int) -> Prediction:
        images = torch.cat([pairs.first, pairs.second]).float() / 127.5 - 1
        half = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, half):
            features, context = self.network.encode(images)
            first, second = features.chunk(2)
            return self.network(first, second, context[: len(first)], updates=updates)

    def _validate(self, bar: tqdm, report: Report, seconds: list[float]) -> None:
        scores = self.validate()
        pace = {"seconds_per_step": statistics.median(seconds)} if seconds else {}
        report(self.step, scores | pace)
        bar.set_postfix({name: f"{scores[f'epe/{name}']:.2f}" for name in VALIDATION})

    def _freeze_batch_norm(self) -> None:
        """Keep running statistics (of raft_large) from half the run on, as RAFT does."""
        if self.step > self.recipe.steps // 2:
            for module in self.network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()


def _counted(pairs: FlowPairs) -> Tensor:
    """(B, H, W) bool: the pixels that are trained and validated on."""
    return pairs.valid & (pairs.flow.norm(dim=1) < LONGEST)


def _target_inside(pairs: FlowPairs) -> Tensor:
    """(B, H, W) bool: the target lies in the frame, occluded or not."""
    height, width = pairs.flow.shape[-2:]
    x = pairs.flow[:, 0] + torch.arange(width, device=pairs.flow.device) + 0.5
    y = pairs.flow[:, 1] + torch.arange(height, device=pairs.flow.device)[:, None] + 0.5
    return (x >= 0) & (x <= width) & (y >= 0) & (y <= height)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` (B, H, W) over `where` (B, H, W) bool, 0 over none."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _sums(prediction: Prediction, pairs: FlowPairs) -> Tensor:
    """(7,) float64 sums over pixels, in the order in which `RaftTrainer.validate` unpacks them."""
    assert prediction.occlusion is not None and prediction.log_variance is not None
    counted = _counted(pairs)
    visible, inside = counted & pairs.visible, counted & _target_inside(pairs)
    difference = prediction.flows[-1] - pairs.flow
    error = difference.norm(dim=1)
    correct = (prediction.occlusion > 0) == ~pairs.visible
    within = difference.abs() < torch.exp(prediction.log_variance / 2)[:, None]
    parts = [
        (error * counted).sum(),
        counted.sum(),
        (error * visible).sum(),
        visible.sum(),
        (correct & inside).sum(),
        inside.sum(),
        (within & visible[:, None]).sum(),
    ]
    return torch.stack([part.double() for part in parts])


def _one_cycle(fraction: float) -> float:
    """Factor on the learning rate: linearly up for 5 % of the run, then linearly down."""
    return min(fraction / 0.05 + 0.01, (1 - fraction) / 0.95, 1.0)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON and checkpoints keep it."""
    values = asdict(recipe)
    return values | {"size": list(values["size"])}
