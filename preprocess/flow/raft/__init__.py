"""RAFT as a flow provider: the network, where its weights come from, and batches of pairs.

`network` is the module that is trained, `weights` finds its parameters, `provider` implements the
interface `preprocess.flow.provider.FlowProvider` with them. Loads torchvision, so it is imported
only where RAFT is used.
"""

from preprocess.flow.raft.network import SMALLEST_SIDE, FlowNetwork, Prediction, read_weights
from preprocess.flow.raft.provider import RaftFlow
from preprocess.flow.raft.weights import EMBEDDED, Weights, find_weights, weights_digest

__all__ = [
    "EMBEDDED",
    "FlowNetwork",
    "Prediction",
    "RaftFlow",
    "SMALLEST_SIDE",
    "Weights",
    "find_weights",
    "read_weights",
    "weights_digest",
]
