"""RAFT as a flow provider.

`network` computes flow from encoded frames, `provider` implements the interface
`preprocess.flow.provider.FlowProvider` with it. Loads torchvision, so it is imported only where
RAFT is used.
"""

from preprocess.flow.raft.provider import RaftFlow

__all__ = ["RaftFlow"]
