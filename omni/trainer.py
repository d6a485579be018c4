"""The optimisation loop and nothing else. What it sees goes out through two callbacks."""

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from omni import losses, rendering
from omni.camera import global_motion
from omni.checkpoint import is_count, load_checkpoint, restore_optimizer, save_checkpoint
from omni.config import Config, digest, to_dict
from omni.coords import denormalize, normalize
from omni.errors import DamagedError
from omni.initialize import chain_tracks, imported_tracks, surface_depth
from omni.lock import require_lock
from omni.memory import out_of_memory
from omni.model import Field, Rays
from omni.sampling import Batch, CorrespondenceSampler, LongTracks
from omni.schedules import gap_limit, learning_rate
from omni.signals import Interrupted, stop_signals
from omni.store import Store
from omni.tracks import Tracks

__all__ = ["Trainer", "fit_key"]

log = logging.getLogger(__name__)

HELD_OUT = 8192
"""Held-out correspondences judged at each evaluation."""

MAX_ROLLBACKS = 3
"""The fit ends when it would have to roll back once more."""

MEASURES = ("median", "mean", "within_1px", "within_3px", "astray", "in_front")
"""What an evaluation says, by name."""

JUDGED_AT = 0.2
"""Share of the steps after which a fit that has gone wrong is started anew, once."""

ASTRAY, MOST_ASTRAY = 16.0, 0.1
"""Pixels at a short side of 256, and the largest share of held-out correspondences that may lie
further off: an object that is in canonical space twice leaves all those between its two copies."""

MOST_IN_FRONT = 0.4
"""Largest share of held-out hidden points that may lie in front of what hides them. Fits of the
development clips have .02 to .17 by then, even those that start from the opposite depths."""


def fit_key(store: Store, config: Config, matches: Tracks | None = None) -> str:
    """Hash of everything that decides the result of a fit: its inputs and settings."""
    imported = "" if matches is None else hashlib.sha256(matches.to_bytes()).hexdigest()
    settings = to_dict(config)
    for section in ("data", "flow", "output", "device", "threads"):
        settings.pop(section)
    for cadence in ("checkpoint_seconds", "log_every", "image_every"):
        settings["optim"].pop(cadence)
    stages = store.manifest["stages"]
    return digest(settings, config.flow.cycle_threshold, stages["evidence"]["key"], imported)


class Trainer:
    """Fits one `Field` to one store.

    Args:
        store: finished preprocessing.
        config: every setting.
        checkpoint: file to continue from and to save to.
        device: where the model and the correspondences live.
        on_scalars: called with (step, name to value) every `optim.log_every` steps.
        on_images: called with the trainer every `optim.image_every` steps and at the end.
        matches: tracks of another tracker, further supervision.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        checkpoint: Path,
        device: torch.device,
        on_scalars: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        on_images: Callable[["Trainer"], None] = lambda trainer: None,
        matches: Tracks | None = None,
    ):
        self.store, self.config, self.device = store, config, device
        self.path, self.on_scalars, self.on_images = checkpoint, on_scalars, on_images
        self.key = fit_key(store, config, matches)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.field = self._new_field(config.seed)
        self.sampler = CorrespondenceSampler(
            store,
            config.sampling,
            config.flow.cycle_threshold,
            device,
            self.generator,
            self._long_tracks(matches),
        )
        self.optimizer = self._make_optimizer()
        self.step, self.rate, self.rollbacks, self.restarts = 0, 1.0, 0, 0
        self.history: list[dict[str, float]] = []
        self.judged = self.sampler.held_out(HELD_OUT, seed=config.seed)
        self._stop_signal: int | None = None

    def run(self) -> None:
        """Train to the end, continuing a checkpoint of the same fit if there is one.

        Raises:
            Interrupted: on a stop signal, after saving.
            OmniError: the checkpoint cannot be written, or is not ours to write any more.
        """
        self._good = self._resume() or self.state()
        if self.finished:
            return
        saved = time.monotonic()
        bar = tqdm(
            total=self.config.optim.steps, initial=self.step, desc="fit", unit="step", disable=None
        )
        with stop_signals(self._note_signal), bar:
            while not self.finished and self._stop_signal is None:
                self._advance(bar)
                if time.monotonic() - saved > self.config.optim.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            self.save()
        if self._stop_signal is not None:
            raise Interrupted(self._stop_signal)
        self.on_images(self)

    def _note_signal(self, number: int, frame: object) -> None:
        """Stop after the current step."""
        self._stop_signal = number

    @property
    def finished(self) -> bool:
        """Whether the fit is over: out of steps, no more progress, or too many roll-backs."""
        return self.step >= self.config.optim.steps or self.gave_up or self._stalled()

    @property
    def gave_up(self) -> bool:
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
                values[f"lr/{group['name']}"] = group["lr"]
            self.on_scalars(self.step, values)
        if self.step % optim.evaluate_every == 0 or self.step == optim.steps:
            result = self.evaluate()
            if not self._sound(result):
                self._roll_back()
                bar.n = self.step
                return
            self.history.append({"step": self.step, **result})
            self.on_scalars(self.step, {f"held_out/{k}": v for k, v in result.items()})
            bar.set_postfix(held_out=f"{result['median']:.2f}px")
            if self._gone_wrong(result):
                self._start_anew(result)
                bar.n = self.step
            self._good = self.state()
        if self.step % optim.image_every == 0 and not self.finished:
            self.on_images(self)

    def train_step(self) -> dict[str, Tensor] | None:
        """One update; the loss terms by name, or None where it had to be rolled back."""
        fraction = self.step / self.config.optim.steps
        self.optimizer.zero_grad(set_to_none=True)
        try:
            done = self._backward(fraction)
        except Exception as error:
            if not out_of_memory(error) or self.sampler.batch_pairs == 1:
                raise
            done = None
        if done is None:  # outside the handler: the error would hold on to the memory
            self._halve()
            return None
        batch, residual, terms = done
        if not self._finite(terms["total"]):
            self._roll_back()
            return None
        factor = self.rate * learning_rate(self.config.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor
        self.optimizer.step()
        self.sampler.report(batch, residual)
        return terms

    def _backward(self, fraction: float) -> tuple[Batch, Tensor, dict[str, Tensor]]:
        """Gradients of one batch; the batch, its residuals in sigma `(K, N)` and loss terms.

        On its own, so that nothing of a batch too large for the memory outlives the failure.
        """
        sampling = self.config.sampling
        batch = self.sampler.draw(gap_limit(sampling.gap_start, sampling.gap_end, fraction))
        terms, residual = self._terms(batch)
        loss = losses.total(terms, self.config.loss, fraction)
        loss.backward()
        return batch, residual, terms | {"total": loss.detach()}

    def _terms(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Every loss term with a weight in the config, and the residuals in sigma `(K, N)`."""
        config, size = self.config.loss, self.store.size
        source, target = batch.source.float(), batch.target.float()
        jitter = torch.rand(
            *batch.visible.shape, self.config.render.samples, generator=self.generator
        ).sub(0.5)
        xy = normalize(batch.xy, size)
        rays = self.field.cast(source, xy, jitter.to(self.device))
        reached, mapped = self.field.follow(rays, target)
        difference = denormalize(reached[..., :2], size) - batch.target_xy
        weight = batch.visible + batch.hidden
        color = rays.composite_color()
        terms = {
            "flow": losses.flow_robust(difference, batch.sigma, batch.visible)
            if config.robust
            else losses.flow_absolute(difference, weight * self._pair_weight(batch)),
            "photometric": losses.photometric(color, batch.color),
            "depth_range": losses.depth_range(mapped[..., 2], rendering.NEAR, rendering.FAR),
        }
        if self.field.surface is not None:
            own = self.field.surface.at(source, xy)
            # Flow to a hidden point is its occluder's: what hides it is where the field takes it.
            landed = reached.detach()[..., :2]
            hidden = batch.hidden * (landed.abs() < 1).all(-1)
            measured = normalize(batch.target_xy, size)
            place = torch.where(hidden[..., None] > 0, landed, measured)
            there = self.field.surface.at(target, place)
            margin = self.config.render.occlusion_margin
            terms["surface"] = losses.surface_map(own, rays.composite_depth())
            terms["surface"] = terms["surface"] + losses.surface_order(
                reached[..., 2], there, batch.visible, hidden, margin
            )
        if config.constancy.weight:
            here = self.sampler.patches(batch.source, batch.xy)
            there = self.sampler.patches(batch.target, denormalize(reached[..., :2], size))
            terms["constancy"] = losses.constancy(there, here, batch.visible)
        if config.acceleration.weight and self.store.num_frames > 2:
            terms["acceleration"] = self._acceleration(rays, source)
        if config.distortion.weight:
            terms["distortion"] = rendering.distortion(rays.weight, rays.depth, rays.step).mean()
        if config.photometric_difference.weight:
            terms["photometric_difference"] = losses.adjacent_difference(
                color, batch.color, torch.ones_like(weight)
            )
        if config.flow_difference.weight:
            terms["flow_difference"] = losses.adjacent_difference(
                denormalize(reached[..., :2], size), batch.target_xy, weight
            )
        distance = difference.detach().norm(dim=-1) / batch.sigma
        return terms, distance

    def _acceleration(self, rays: Rays, times: Tensor) -> Tensor:
        """Of a quarter of the points, in the stabilised plane: camera shake costs nothing."""
        count = max(1, rays.weight.shape[1] // 4)
        points = rendering.composite(rays.weight[:, :count], rays.canonical[:, :count])
        middle = times.clamp(1, self.store.num_frames - 2)
        stacked = torch.cat([middle - 1, middle, middle + 1])
        path = self.field.from_canonical(stacked, points.repeat(3, 1, 1), stabilized=True)
        return losses.acceleration(*path.chunk(3))

    def _pair_weight(self, batch: Batch) -> Tensor:
        """The original's cosine weight of a pair, falling to 0 at the longest trained gap."""
        sampling = self.config.sampling
        fraction = self.step / self.config.optim.steps
        longest = gap_limit(sampling.gap_start, sampling.gap_end, fraction)
        gap = (batch.target - batch.source).abs().float()
        return torch.cos((gap - 1) / longest * (torch.pi / 2)).clamp(min=0)[:, None]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How well the field explains held-out correspondences, by the names of MEASURES.

        Median and mean error in pixels, shares within 1 and 3 pixels and further off than ASTRAY,
        and the share of hidden points that it has in front of what hides them.
        """
        batch, size = self.judged, self.store.size
        target = batch.target.float()
        rays = self.field.cast(batch.source.float(), normalize(batch.xy, size))
        reached, _ = self.field.follow(rays, target)
        landed = reached[..., :2]
        distance = (denormalize(landed, size) - batch.target_xy).norm(dim=-1)[batch.visible > 0]
        hidden = (batch.hidden > 0) & (landed.abs() < 1).all(-1)
        nearest = self.field.seen_depth(target, landed) - self.config.render.occlusion_margin / 2
        ahead = (reached[..., 2] < nearest)[hidden]
        if len(distance) == 0:
            distance = torch.zeros(1)
        marks = distance < 1, distance < 3, distance > ASTRAY * min(size) / 256
        shares = [float(mark.float().mean()) for mark in marks]
        in_front = float(ahead.float().mean()) if len(ahead) else 0.0
        values = float(distance.median()), float(distance.mean()), *shares, in_front
        return dict(zip(MEASURES, values, strict=True))

    def _gone_wrong(self, result: dict[str, float]) -> bool:
        """Whether the fit, while it is early, shows that it needs another start."""
        optim = self.config.optim
        early = self.step <= JUDGED_AT * optim.steps < self.step + optim.evaluate_every
        bad = result["astray"] > MOST_ASTRAY or result["in_front"] > MOST_IN_FRONT
        return early and bad and self.restarts == 0

    def _start_anew(self, result: dict[str, float]) -> None:
        """Begin again from other weights, and from the opposite depths if the order is wrong."""
        log.warning(
            "step %d: %.0f %% of the held-out points lie far off, %.0f %% of the hidden ones in "
            "front: starting the fit anew",
            self.step,
            100 * result["astray"],
            100 * result["in_front"],
        )
        self.restarts, self.step, self.history = 1, 0, []
        self.field = self._new_field(self.config.seed + 1000003)
        if self.field.surface is not None and result["in_front"] > MOST_IN_FRONT:
            with torch.no_grad():
                self.field.surface.depth.neg_().add_(rendering.NEAR + rendering.FAR)
        self.optimizer = self._make_optimizer()
        self.sampler.residual.fill_(1)

    def _sound(self, result: dict[str, float]) -> bool:
        """Whether an evaluation and every parameter are finite: nothing else may be a result."""
        finite = [torch.isfinite(parameter).all() for parameter in self.field.parameters()]
        return math.isfinite(result["mean"]) and bool(torch.stack(finite).all())

    def state(self) -> dict[str, Any]:
        """Everything that decides what happens next, as tensors and plain values."""
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
        """Continue a checkpoint of the same fit; the good state it came with."""
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
            for known in (good, state):  # both, so that a roll-back cannot fail later
                self._restore(known)
            return good
        except Exception as error:  # a crafted state can fail anywhere in its readers
            if out_of_memory(error):
                raise
            raise DamagedError(
                f"{self.path} does not fit itself: delete it and run again"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`, which may come from an untrusted file.

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
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.history = state["step"], history
        self.rate, self.rollbacks, self.restarts = rate, state["rollbacks"], state["restarts"]
        self.sampler.halvings = max(self.sampler.halvings, state["halvings"])

    def _finite(self, loss: Tensor) -> bool:
        """Whether the loss and every gradient are finite; bounds that of the couplings."""
        mapping = list(self.field.bijection.parameters())
        known = {id(p) for p in mapping}
        others = [p for p in self.field.parameters() if id(p) not in known]
        clip_grad_norm = torch.nn.utils.clip_grad_norm_
        norm = clip_grad_norm(mapping, self.config.optim.clip or float("inf"))
        rest = clip_grad_norm(others, float("inf"))
        return bool(torch.isfinite(loss) & torch.isfinite(norm) & torch.isfinite(rest))

    def _roll_back(self) -> None:
        """Return to the last good state with half the learning rate."""
        rollbacks, rate = self.rollbacks + 1, self.rate / 2
        log.warning("not finite at step %d: back to the last good state", self.step)
        self._restore(self._good)
        self.rollbacks, self.rate = rollbacks, rate
        # Else the same draw would come again.
        self.generator.manual_seed(self.config.seed + 1000003 * rollbacks)

    def _halve(self) -> None:
        """Go on with half as many pairs per batch."""
        self.sampler.halvings += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning(
            "out of memory at step %d: going on with batches of %d pairs",
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
        """Random weights; global motion and surface maps from the flows."""
        config, store = self.config, self.store
        torch.manual_seed(seed)
        field = Field(store.num_frames, config.model, config.render, self.device.type == "cuda")
        motion = global_motion(store, config.flow.cycle_threshold)
        with torch.no_grad():
            if field.motion is not None:
                field.motion.matrices.copy_(torch.from_numpy(motion))
            if field.surface is not None:
                depth = surface_depth(store, motion, config.model.surface)
                field.surface.depth.copy_(torch.from_numpy(depth))
        return field.to(self.device)

    def _long_tracks(self, matches: Tracks | None) -> LongTracks | None:
        if not self.config.sampling.tracks:
            return None
        chains = chain_tracks(self.store)
        return chains if matches is None else chains.joined(imported_tracks(matches, self.store))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        field, optim = self.field, self.config.optim
        code = list(field.bijection.code.parameters())
        known = {id(p) for p in code}
        groups = {
            "mapping": [p for p in field.bijection.parameters() if id(p) not in known],
            "code": code,
            "canonical": list(field.volume.parameters()),
            "surface": list(field.surface.parameters()) if field.surface is not None else [],
            "motion": list(field.motion.parameters()) if field.motion is not None else [],
        }
        return torch.optim.Adam(
            [
                {"params": parameters, "name": name, "base": getattr(optim, f"lr_{name}")}
                for name, parameters in groups.items()
                if parameters
            ],
            betas=optim.betas,
            fused=True,
        )
