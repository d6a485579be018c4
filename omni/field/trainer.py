"""The optimisation loop and nothing else. Progress is reported through two callbacks."""

import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omni.config import Config
from omni.errors import DamagedError
from omni.field.checkpoint import is_count, load_checkpoint, restore_optimizer, save_checkpoint
from omni.field.held_out import LARGEST_IN_FRONT, MEASURES, evaluate_held_out, has_failed
from omni.field.initialisation import global_motion, surface_depth
from omni.field.model import FAR, NEAR, Field
from omni.field.motion_layers import find_layers
from omni.field.objective import Objective
from omni.field.optimizer import make_optimizer
from omni.field.sampling import Batch, CorrespondenceSampler, LongTracks
from omni.field.schedules import gap_limit, learning_rate
from omni.field.update import CapturedUpdate, Update, term_weights
from omni.store import Store
from omni.system import Interrupted, digest, out_of_memory, require_lock, stop_signals, to_dict

__all__ = ["Trainer", "fit_key"]

log = logging.getLogger(__name__)

HELD_OUT = 8192
"""Held-out correspondences that each evaluation measures."""

MAX_ROLLBACKS = 3
"""The fit ends when it would have to roll back once more."""

RESTART_AT = 0.2
"""Share of the steps after which a failed fit is started anew, once."""


def fit_key(store: Store, config: Config, imported: str = "") -> str:
    """Hash of everything that decides the result of a fit: its inputs and settings.

    Args:
        store: finished preprocessing.
        config: every setting.
        imported: hash of another tracker's tracks that supervise the fit; empty without.
    """
    settings = to_dict(config)
    for section in ("data", "flow", "output", "device", "threads"):
        settings.pop(section)
    for cadence in ("checkpoint_seconds", "log_every", "image_every"):
        settings["optim"].pop(cadence)
    if not config.model.planes:
        settings["model"].pop("planes")  # so that the fits of versions without planes go on
    stages = store.manifest["stages"]
    return digest(settings, config.flow.cycle_threshold, stages["evidence"]["key"], imported)


class Trainer:
    """Fits one `Field` to one store.

    Args:
        store: finished preprocessing.
        config: every setting.
        checkpoint: file to continue from and to save to.
        device: where the model and the correspondences live.
        tracks: supervision beyond the longest stored flow; None without.
        imported: see `fit_key`.

    Attributes:
        on_scalars: called with (step, name to value) every `optim.log_every` steps.
        on_images: called with the trainer every `optim.image_every` steps and at the end.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        checkpoint: Path,
        device: torch.device,
        tracks: LongTracks | None = None,
        imported: str = "",
    ):
        self.store, self.config, self.device = store, config, device
        self.path, self.tracks = checkpoint, tracks
        self.on_scalars: Callable[[int, dict[str, float]], None] = lambda step, values: None
        self.on_images: Callable[[Trainer], None] = lambda trainer: None
        self.key = fit_key(store, config, imported)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.field = self._new_field(config.seed)
        self.sampler = CorrespondenceSampler(
            store,
            config.sampling,
            config.flow.cycle_threshold,
            device,
            self.generator,
            tracks,
        )
        self.optimizer = make_optimizer(self.field, config.optim)
        self.step, self.rate, self.rollbacks, self.restarts = 0, 1.0, 0, 0
        self.history: list[dict[str, float]] = []
        self.objective = Objective(config, self.sampler, store.size, store.num_frames)
        self.update, self._left_out = self._new_update(), torch.zeros((), device=device)
        self.held_out = self.sampler.held_out(HELD_OUT, seed=config.seed)
        self._stop_signal: int | None = None

    def run(self) -> None:
        """Train to the end, continuing a checkpoint of the same fit if there is one.

        Raises:
            Interrupted: on a stop signal, after saving.
            OmniError: the checkpoint cannot be written, or another process has taken the run over.
        """
        self._good = self._resume() or self.state()
        if self.finished:
            return
        saved = time.monotonic()
        bar = tqdm(
            total=self.config.optim.steps, initial=self.step, desc="fit", unit="step", disable=None
        )
        with stop_signals(self._note_signal), bar:
            while not self.finished and not self._stopped:
                self._advance(bar)
                if time.monotonic() - saved > self.config.optim.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            self.save()
        if self._stop_signal is not None:
            raise Interrupted(self._stop_signal)
        self.on_images(self)

    @property
    def _stopped(self) -> bool:
        """Whether a stop signal has come."""
        return self._stop_signal is not None

    def _note_signal(self, number: int, frame: object) -> None:
        """Stop after the current step."""
        self._stop_signal = number

    @property
    def finished(self) -> bool:
        """Whether the fit is over: out of steps, no more progress, or too many roll-backs."""
        return self.step >= self.config.optim.steps or self.diverged or self._stalled()

    @property
    def diverged(self) -> bool:
        """Whether the loss diverged too often; the last good state is kept as the result."""
        return self.rollbacks > MAX_ROLLBACKS

    def _advance(self, bar: tqdm) -> None:
        optim = self.config.optim
        terms = self.train_step()
        if terms is None:
            bar.n = self.step
            return
        self.step += 1
        bar.update()
        if self.step % optim.log_every == 0:
            values = {f"loss/{name}": float(value.detach()) for name, value in terms.items()}
            for group in self.optimizer.param_groups:
                values[f"lr/{group['name']}"] = float(group["lr"])
            self.on_scalars(self.step, values)
        if self.step % optim.evaluate_every == 0 or self.step == optim.steps:
            result = self.evaluate()
            if not self._all_finite(result):
                self._roll_back()
                bar.n = self.step
                return
            self.history.append({"step": self.step, **result})
            self.on_scalars(self.step, {f"held_out/{k}": v for k, v in result.items()})
            bar.set_postfix(held_out=f"{result['median']:.2f}px")
            if self._needs_restart(result):
                self._restart(result)
                bar.n = self.step
            self._good = self.state()
        if self.step % optim.image_every == 0 and not self.finished:
            self.on_images(self)

    def train_step(self) -> dict[str, Tensor] | None:
        """One update; the loss terms by name, or None where it had to be rolled back."""
        fraction = self.step / self.config.optim.steps
        try:
            done = self._apply_batch(fraction)
        except Exception as error:
            if not out_of_memory(error) or self.sampler.batch_pairs == 1:
                raise
            done = None
        if done is None:  # outside the handler: the error would hold on to the memory
            self._halve()
            return None
        batch, residual, terms, finite = done
        self._left_out += ~finite
        if self._waits_for_the_device() and self._left_out > 0:
            self._roll_back()
            return None
        self.sampler.report(batch, residual)
        return terms

    def _apply_batch(self, fraction: float) -> tuple[Batch, Tensor, dict[str, Tensor], Tensor]:
        """Update by one batch; the batch, its residuals `(K, N)`, loss terms, and whether it was.

        On its own, so that nothing of a batch too large for the memory outlives the failure.
        """
        config, sampling = self.config, self.config.sampling
        longest = gap_limit(sampling.gap_start, sampling.gap_end, fraction)
        batch = self.sampler.draw(longest)
        shape = *batch.visible.shape, config.render.samples
        jitter = torch.rand(shape, generator=self.generator, device=self.device).sub(0.5)
        weights = term_weights(config.loss, fraction)
        rate = self.rate * learning_rate(config.optim, self.step)
        terms, residual, finite = self.update(batch, jitter, longest, weights, rate)
        return batch, residual, terms, finite

    def _waits_for_the_device(self) -> bool:
        """Whether the host looks at results after this step: always where that costs nothing."""
        optim, step = self.config.optim, self.step + 1
        cadences = optim.log_every, optim.evaluate_every, optim.steps
        return self.device.type == "cpu" or any(step % cadence == 0 for cadence in cadences)

    def _new_update(self) -> Update | CapturedUpdate:
        """How batches are applied to the present field."""
        clip = self.config.optim.clip or float("inf")
        update = Update(self.field, self.optimizer, self.objective, clip)
        # The original's flow loss depends on the longest gap, which changes from step to step.
        captured = self.device.type == "cuda" and self.config.loss.robust
        return CapturedUpdate(update) if captured else update

    def evaluate(self) -> dict[str, float]:
        """See `evaluate_held_out`."""
        margin = self.config.render.occlusion_margin
        return evaluate_held_out(self.field, self.held_out, self.store.size, margin)

    def _needs_restart(self, result: dict[str, float]) -> bool:
        """Whether the fit, while it is early, shows that it needs another start."""
        optim = self.config.optim
        early = self.step <= RESTART_AT * optim.steps < self.step + optim.evaluate_every
        return early and has_failed(result) and self.restarts == 0

    def _restart(self, result: dict[str, float]) -> None:
        """Start from other weights, and from the opposite depths if their order is inverted."""
        log.warning(
            "step %d: %.0f %% of the held-out points lie far off, %.0f %% of the hidden ones in "
            "front: starting the fit anew",
            self.step,
            100 * result["outliers"],
            100 * result["in_front"],
        )
        self.restarts, self.step, self.history = 1, 0, []
        self.field = self._new_field(self.config.seed + 1000003)
        if self.field.surface is not None and result["in_front"] > LARGEST_IN_FRONT:
            with torch.no_grad():
                self.field.surface.depth.neg_().add_(NEAR + FAR)
                if self.field.planes is not None:  # every layer keeps its motion
                    self.field.planes.values.copy_(self.field.planes.values.flip(1))
        self.optimizer = make_optimizer(self.field, self.config.optim)
        self.update = self._new_update()
        self.sampler.residual.fill_(1)

    def _all_finite(self, result: dict[str, float]) -> bool:
        """Whether an evaluation and every parameter are finite, as a result must be."""
        finite = [torch.isfinite(parameter).all() for parameter in self.field.parameters()]
        return math.isfinite(result["mean"]) and bool(torch.stack(finite).all())

    def state(self) -> dict[str, Any]:
        """Everything that determines the rest of the fit, as tensors and plain values."""
        return copy.deepcopy(
            {
                "key": self.key,
                "config": to_dict(self.config),
                "num_frames": self.store.num_frames,
                "step": self.step,
                "rate": self.rate,
                "rollbacks": self.rollbacks,
                "restarts": self.restarts,
                "history": self.history,
                "field": self.field.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(),
                "halvings": self.sampler.halvings,
                "finished": self.finished,
            }
        )

    def save(self) -> None:
        """Write the checkpoint, with the state that a roll-back would return to.

        Raises:
            OmniError: it cannot be written, or another process has taken the run over.
        """
        require_lock(self.path.parent)
        save_checkpoint(self.path, {**self.state(), "good": self._good})

    def _resume(self) -> dict[str, Any] | None:
        """Continue a checkpoint of the same fit; returns the last good state stored with it."""
        if not self.path.is_file():
            return None
        try:
            state = load_checkpoint(self.path)
        except DamagedError as error:
            log.warning("%s; starting the fit anew", error)
            return None
        if state.get("key") != self.key:
            log.warning("inputs or settings of the fit changed: starting it anew")
            return None
        try:
            good = state.pop("good", state)
            for part in (good, state):  # both, so that a roll-back cannot fail later
                self._restore(part)
            return good
        except Exception as error:  # a crafted state can fail anywhere in its readers
            if out_of_memory(error):
                raise
            raise DamagedError(
                f"{self.path} does not fit itself: delete it and run again"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
        """Return to a `state`, which may come from an untrusted file.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: its parts are not what they should be.
        """
        state = copy.deepcopy(state)
        counts = "step", "rollbacks", "restarts", "halvings"
        rate, history = state["rate"], state["history"]
        if not all(is_count(state[name]) for name in counts):
            raise ValueError("a count is none")
        if type(rate) is not float or not 0 < rate <= 1:
            raise ValueError("the rate is out of range")
        if type(history) is not list or any(
            type(entry[name]) not in (int, float)
            for entry in history
            for name in ("step", *MEASURES)
        ):
            raise ValueError("the history is none")
        self.field.load_state_dict(state["field"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.update = self._new_update()
        self._left_out.zero_()
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.history = state["step"], history
        self.rate, self.rollbacks, self.restarts = rate, state["rollbacks"], state["restarts"]
        self.sampler.halvings = max(self.sampler.halvings, state["halvings"])

    def _roll_back(self) -> None:
        """Return to the last good state with half the learning rate."""
        rollbacks, rate = self.rollbacks + 1, self.rate / 2
        log.warning("not finite at step %d: back to the last good state", self.step)
        self._restore(self._good)
        self.rollbacks, self.rate = rollbacks, rate
        # Otherwise the same batch would be drawn again.
        self.generator.manual_seed(self.config.seed + 1000003 * rollbacks)

    def _halve(self) -> None:
        """Continue with half as many pairs per batch."""
        self.sampler.halvings += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning(
            "out of memory at step %d: continuing with batches of %d pairs",
            self.step,
            self.sampler.batch_pairs,
        )

    def _stalled(self) -> bool:
        """No held-out improvement above 1 % over the last `patience` evaluations."""
        patience = self.config.optim.patience
        if patience <= 0 or len(self.history) <= patience:
            return False
        means = [entry["mean"] for entry in self.history]
        return min(means[-patience:]) > 0.99 * min(means[:-patience])

    def _new_field(self, seed: int) -> Field:
        """Random weights; motion and surface maps from the flows and the long tracks."""
        config, store = self.config, self.store
        torch.manual_seed(seed)
        field = Field(store.num_frames, config.model, config.render, self.device.type == "cuda")
        motion = global_motion(store, config.flow.cycle_threshold)
        with torch.no_grad():
            if field.motion is not None:
                field.motion.matrices.copy_(torch.from_numpy(motion))
            if field.planes is not None and field.surface is not None and self.tracks is not None:
                planes, cells = config.model.planes, config.model.surface
                removed = motion if field.motion is not None else 0 * motion + np.eye(2, 3)
                maps, shown = find_layers(store, removed, self.tracks, planes, cells)
                field.planes.start_from(torch.from_numpy(maps))
                field.surface.depth.copy_((torch.from_numpy(shown) + 0.5) * (FAR - NEAR) / planes)
            elif field.surface is not None:
                depth = surface_depth(store, motion, config.model.surface)
                field.surface.depth.copy_(torch.from_numpy(depth))
        return field.to(self.device)
