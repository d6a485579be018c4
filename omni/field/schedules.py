"""Schedules: step to value, as pure functions. Positions in the run are fractions in [0, 1]."""

import math

from omni.config import OptimConfig, Term

__all__ = ["gap_limit", "learning_rate", "ramp"]


def ramp(term: Term, fraction: float) -> float:
    """Weight of a loss term: 0 before `begin`, linear to `end`, then constant."""
    if fraction >= term.end:
        return term.weight
    if fraction <= term.begin:
        return 0.0
    return term.weight * (fraction - term.begin) / (term.end - term.begin)


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Factor on every learning rate at `step`: linear warm-up times the decay.

    cosine: from 1 to 0.02 over the run. step: halved at every fifth of the run, as the original's
    factor 0.5 every 20k of 100k steps.
    """
    fraction = min(step / optim.steps, 1.0)
    warm = min((step + 1) / optim.warmup, 1.0) if optim.warmup > 0 else 1.0
    if optim.decay == "step":
        return warm * 0.5 ** math.floor(5 * fraction)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))


def gap_limit(start: int, end: int, fraction: float) -> int:
    """Longest gap (frames) trained at this fraction of the run: grows linearly."""
    return start + math.floor((end - start) * min(fraction, 1.0))
