"""How reliable flow is, measured without ground truth, and sparse matches beside it.

`consistency` checks cycles, `sigma` calibrates the error of a flow, `cuts` finds shot boundaries,
`landmarks` matches features between key frames.

May import `preprocess.flow` and what it may import.
"""

from preprocess.evidence.consistency import assess, gap_statistics
from preprocess.evidence.cuts import find_cuts
from preprocess.evidence.landmarks import MATCHES, find_features, key_pairs, match
from preprocess.evidence.sigma import (
    NOISE,
    calibrated,
    corrected,
    cycle_residuals,
    reload_sigma,
)

__all__ = [
    "MATCHES",
    "NOISE",
    "assess",
    "calibrated",
    "corrected",
    "cycle_residuals",
    "find_cuts",
    "find_features",
    "gap_statistics",
    "key_pairs",
    "match",
    "reload_sigma",
]
