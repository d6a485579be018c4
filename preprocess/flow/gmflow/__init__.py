"""GMFlow as a flow provider.

`network` computes flow from encoded frames, `provider` implements the interface
`preprocess.flow.provider.FlowProvider` with it.
"""

from preprocess.flow.gmflow.network import GMFlow
from preprocess.flow.gmflow.provider import GmFlow

__all__ = ["GMFlow", "GmFlow"]
