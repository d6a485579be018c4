"""Tracks of every pixel of a frame, from coarse to fine.

`anchors` are points of a coarse grid, which the read-out answers among all their candidates;
`candidates` gives every pixel its own chain and the tracks of the anchors around it, `features`
describes them, `reader` selects among them, and `export` writes a whole frame band by band. May
import what `omni.tracking` may, and all its modules.
"""

from omni.tracking.dense.anchors import Anchors, anchor_grid, anchor_stage, answer_anchors
from omni.tracking.dense.candidates import PixelCandidates, pixel_candidates
from omni.tracking.dense.export import write_dense
from omni.tracking.dense.features import pixel_features
from omni.tracking.dense.reader import DenseReader

__all__ = [
    "Anchors",
    "DenseReader",
    "PixelCandidates",
    "anchor_grid",
    "anchor_stage",
    "answer_anchors",
    "pixel_candidates",
    "pixel_features",
    "write_dense",
]
