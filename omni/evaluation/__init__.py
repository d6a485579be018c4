"""How good tracks are: ground truth, metrics, and baselines on the same flows.

May import `omni.tracking` and the packages below it.
"""

from omni.evaluation.baselines import baseline
from omni.evaluation.metrics import (
    DISTANCES,
    Mode,
    delta,
    evaluate,
    format_scores,
    queries,
    scored_frames,
)
from omni.evaluation.truth import Truth, load_prediction, load_truth
from omni.tracking import Method

__all__ = [
    "DISTANCES",
    "Method",
    "Mode",
    "Truth",
    "baseline",
    "delta",
    "evaluate",
    "format_scores",
    "load_prediction",
    "load_truth",
    "queries",
    "scored_frames",
]
