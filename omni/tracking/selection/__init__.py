"""Candidate selection: several track hypotheses per point, their features, and the network.

`candidates` gathers the hypotheses, `flow_tracks` chains flows in simpler ways for three of them,
`features` describes them and `network` scores them. May import what `omni.tracking` may, and its
modules for links, landmarks, integration, fusion, appearance and confidence.
"""

from omni.tracking.selection.candidates import (
    FIELD,
    FUSED,
    NUM_CANDIDATES,
    SOURCES,
    Candidates,
    gather_candidates,
)
from omni.tracking.selection.features import candidate_features
from omni.tracking.selection.flow_tracks import DirectFlow, Method, trace
from omni.tracking.selection.network import (
    TRUST_THRESHOLD,
    Selection,
    SelectionNetwork,
    load_network,
    select_candidates,
    select_rows,
    trained_network,
)

__all__ = [
    "Candidates",
    "DirectFlow",
    "FIELD",
    "FUSED",
    "Method",
    "NUM_CANDIDATES",
    "SOURCES",
    "Selection",
    "SelectionNetwork",
    "TRUST_THRESHOLD",
    "candidate_features",
    "gather_candidates",
    "load_network",
    "select_candidates",
    "select_rows",
    "trace",
    "trained_network",
]
