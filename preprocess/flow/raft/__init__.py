"""RAFT as a flow provider.

`network` computes flow from encoded frames, `weights` finds its parameters, `provider` implements
the interface `preprocess.flow.provider.FlowProvider` with them. Loads torchvision, so it is
imported only where RAFT is used.
"""

from preprocess.flow.raft.provider import RaftFlow
from preprocess.flow.raft.weights import Weights, find_weights, weights_digest

__all__ = ["RaftFlow", "Weights", "find_weights", "weights_digest"]
