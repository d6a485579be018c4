"""From stored flows and a field to tracks.

    links -> integration -> fusion with the field -> candidate selection -> smoothing -> tracks

`links` follows points along stored flows and `landmarks` along sparse matches, `integration` joins
them to chains, `fusion` chains and field to paths, `selection` picks the best of several track
hypotheses, `confidence` predicts visibility and sigma, and `readout` runs all this for queries.
May import everything of `omni` below it: `maths`, `system`, `config`, `store`, `field`.
"""

from omni.tracking.confidence import CUES
from omni.tracking.dense import (
    Anchors,
    DenseReader,
    anchor_grid,
    anchor_stage,
    answer_anchors,
    write_dense,
)
from omni.tracking.integration import STRICT, integrate
from omni.tracking.links import Links, sample_flow
from omni.tracking.readout import Reader
from omni.tracking.selection import FUSED, DirectFlow, Method, SelectionNetwork, trace
from omni.tracking.supervision import chain_tracks, imported_tracks, long_tracks
from omni.tracking.tracks import (
    ENTRY_BYTES,
    Tracks,
    frame_rate,
    frame_size,
    load_queries,
    read_arrays,
)

__all__ = [
    "Anchors",
    "CUES",
    "DenseReader",
    "DirectFlow",
    "ENTRY_BYTES",
    "FUSED",
    "Links",
    "Method",
    "Reader",
    "STRICT",
    "SelectionNetwork",
    "Tracks",
    "anchor_grid",
    "anchor_stage",
    "answer_anchors",
    "chain_tracks",
    "frame_rate",
    "frame_size",
    "imported_tracks",
    "integrate",
    "load_queries",
    "long_tracks",
    "read_arrays",
    "sample_flow",
    "trace",
    "write_dense",
]
