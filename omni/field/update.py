"""One update of a field: the gradients of a batch's loss and a step of the optimizer.

An update costs some two thousand small operations, most of whose time on a GPU is that of
launching them one by one from Python. There they are captured once, as a CUDA graph, and launched
together from then on.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from omni.config import LossConfig, Term
from omni.field import losses
from omni.field.model import Field
from omni.field.objective import Objective
from omni.field.sampling import Batch
from omni.field.schedules import ramp

__all__ = ["CapturedUpdate", "Update", "term_weights"]

log = logging.getLogger(__name__)

WARM_UP = 3
"""Updates before a capture, in which libraries allocate what they need."""

TOLERANCE = 1e-3
"""Relative difference of the losses after two updates up to which both kinds agree: sums on a GPU
have no fixed order."""


class Update:
    """Applies batches to a field, one operation after the other.

    Args:
        field: in training mode.
        optimizer: Adam over its parameters.
        objective: of the loss terms.
        clip: largest norm of the gradient of the couplings; infinity without clipping.
    """

    def __init__(
        self, field: Field, optimizer: torch.optim.Optimizer, objective: Objective, clip: float
    ):
        self.field, self.optimizer, self.objective, self.clip = field, optimizer, objective, clip

    def __call__(
        self, batch: Batch, jitter: Tensor, longest: int, weights: Mapping[str, float], rate: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Update the parameters unless the loss or a gradient is not finite.

        Args:
            batch: K pairs of N correspondences.
            jitter: `(K, N, S)` in [-0.5, 0.5], fractions of a step along the rays.
            longest: longest gap of the flows drawn at this step, frames.
            weights: of the loss terms, by name.
            rate: factor on every learning rate.

        Returns:
            the loss terms and their total by name, `(K, N)` residuals in sigma, and whether the
            parameters were updated, a bool on the device.
        """
        terms, residual, finite = self.gradients(batch, jitter, longest, weights)
        self.set_rate(rate)
        self.apply(finite)
        return terms, residual, finite

    def gradients(
        self, batch: Batch, jitter: Tensor, longest: int, weights: Mapping[str, float | Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The first half of an update: everything that it returns."""
        self.optimizer.zero_grad(set_to_none=True)
        terms, residual = self.objective.terms(self.field, batch, jitter, longest)
        loss = losses.total(terms, weights)
        loss.backward()
        finite = self._clipped() & torch.isfinite(loss.detach())
        values = {name: value.detach() for name, value in terms.items()}
        return values | {"total": loss.detach()}, residual, finite

    def set_rate(self, rate: float) -> None:
        """Multiply every learning rate by a factor; in place where it is a tensor."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["base"] * rate)
            else:
                group["lr"] = group["base"] * rate

    def apply(self, finite: Tensor) -> None:
        """The second half: a step of the optimizer, which does nothing where not `finite`."""
        # How `torch.amp.GradScaler` tells a fused optimizer, without waiting for the device.
        vars(self.optimizer)["found_inf"] = (~finite).float()
        self.optimizer.step()

    def _clipped(self) -> Tensor:
        """Clip the gradient of the couplings; whether every gradient is finite."""
        mapping = list(self.field.bijection.parameters())
        known = {id(p) for p in mapping}
        others = [p for p in self.field.parameters() if id(p) not in known]
        clip_grad_norm = torch.nn.utils.clip_grad_norm_
        norm, rest = clip_grad_norm(mapping, self.clip), clip_grad_norm(others, float("inf"))
        return torch.isfinite(norm) & torch.isfinite(rest)


class CapturedUpdate:
    """An `Update` as one CUDA graph, which is captured at the first batch of each shape.

    Where it cannot be captured, or where two updates by it differ from two by the operations one
    after the other, those are used instead, which a line in the log says.

    Args:
        update: whose optimizer is capturable.
    """

    def __init__(self, update: Update):
        self.update = update
        self._graph: torch.cuda.CUDAGraph | None = None
        self.refused = False

    def __call__(
        self, batch: Batch, jitter: Tensor, longest: int, weights: Mapping[str, float], rate: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """As an `Update`; what it returns is overwritten by the next call."""
        arguments = batch, jitter, longest, weights, rate
        if self.refused:
            return self.update(*arguments)
        if self._graph is None or self._batch.visible.shape != batch.visible.shape:
            self.refused = not self._agrees(*arguments)
            if self.refused:
                self._graph = None
                return self.update(*arguments)
        return self._replay(*arguments)

    def _replay(
        self, batch: Batch, jitter: Tensor, longest: int, weights: Mapping[str, float], rate: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        assert self._graph is not None
        for name, value in vars(batch).items():
            getattr(self._batch, name).copy_(value)
        self._jitter.copy_(jitter)
        for name, weight in weights.items():
            self._weights[name].fill_(weight)
        self.update.set_rate(rate)
        self._graph.replay()
        return self._results

    def _agrees(
        self, batch: Batch, jitter: Tensor, longest: int, weights: Mapping[str, float], rate: float
    ) -> bool:
        """Capture the graph; whether two updates by it have the effect of two without it.

        The field and the optimizer are left as they were.
        """
        arguments, before = (batch, jitter, longest, weights, rate), self._snapshot()
        try:
            self._capture(*arguments)
            losses = []
            for update in (self.update, self._replay):
                self._return_to(before)
                update(*arguments)
                losses.append(float(update(*arguments)[0]["total"]))
        except RuntimeError as error:  # whatever an operation has against being captured
            torch.cuda.synchronize()
            log.info("updates are not captured as a CUDA graph: %s", error)
            return False
        finally:
            self._return_to(before)
        if abs(losses[1] - losses[0]) <= TOLERANCE * abs(losses[0]):
            return True
        log.warning("updates by a CUDA graph differ: losses of %g and %g", *losses)
        return False

    def _capture(
        self, batch: Batch, jitter: Tensor, longest: int, weights: Mapping[str, float], rate: float
    ) -> None:
        optimizer, device = self.update.optimizer, jitter.device
        self._batch = Batch(*(value.clone() for value in vars(batch).values()))
        self._jitter = jitter.clone()
        self._weights = {name: torch.tensor(float(w), device=device) for name, w in weights.items()}
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["base"] * rate), device=device)
        inputs = self._batch, self._jitter, longest, self._weights
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.update.apply(self.update.gradients(*inputs)[2])
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = self.update.gradients(*inputs)
            self.update.apply(self._results[2])

    def _snapshot(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Copies of all parameters and of their moments, empty before the first update."""
        parameters = list(self.update.field.parameters())
        state = self.update.optimizer.state
        # Not `state[p]`, which makes an entry for what has no gradient.
        moments = [{n: v.clone() for n, v in state.get(p, {}).items()} for p in parameters]
        return [p.detach().clone() for p in parameters], moments

    @torch.no_grad()
    def _return_to(self, snapshot: tuple[list[Tensor], list[dict[str, Tensor]]]) -> None:
        """Undo all updates since in place: a graph refers to the memory, not to the objects."""
        state = self.update.optimizer.state
        for parameter, value, moments in zip(
            self.update.field.parameters(), *snapshot, strict=True
        ):
            parameter.copy_(value)
            for name, moment in state.get(parameter, {}).items():
                moment.copy_(moments[name]) if name in moments else moment.zero_()


def term_weights(config: LossConfig, fraction: float) -> dict[str, float]:
    """Weights of all loss terms by name at this fraction of the run."""
    terms = {name: term for name, term in vars(config).items() if isinstance(term, Term)}
    return {name: ramp(term, fraction) for name, term in terms.items()}
