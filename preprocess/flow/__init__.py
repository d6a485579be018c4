"""Dense flow between two frames, and between all scheduled pairs of a video.

`provider` is the interface that every flow method implements, `dis`, `raft` and `gmflow` are the
methods, `weights` finds what they need, and `registry` selects one of them. May import
`omni.errors`, `omni.config`, `omni.maths`, `omni.system`, `omni.store`, and `preprocess.parallel`.
"""

from preprocess.flow.compute import compute_flows
from preprocess.flow.dis import DisFlow
from preprocess.flow.pairs import halfway, schedule
from preprocess.flow.provider import FlowProvider, ImagePair
from preprocess.flow.registry import accepts, resolve_provider
from preprocess.flow.warp import compose, sample
from preprocess.flow.weights import PUBLISHED, Weights, cached_weights, find_weights, get_weights

__all__ = [
    "DisFlow",
    "FlowProvider",
    "ImagePair",
    "PUBLISHED",
    "Weights",
    "accepts",
    "cached_weights",
    "compose",
    "compute_flows",
    "find_weights",
    "get_weights",
    "halfway",
    "resolve_provider",
    "sample",
    "schedule",
]
