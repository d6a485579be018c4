"""Runs: a folder opened once, and the stages as functions of it.

May import everything of `omni` but `omni.cli`, and `preprocess` where a stage needs it.
"""

from omni.run.doctor import examine
from omni.run.folder import Run, load
from omni.run.stages import (
    answer_anchors,
    export,
    fit,
    import_matches,
    make_trainer,
    optimize,
    preprocess_video,
    track,
    track_baseline,
    visualize,
)

__all__ = [
    "Run",
    "answer_anchors",
    "examine",
    "export",
    "fit",
    "import_matches",
    "load",
    "make_trainer",
    "optimize",
    "preprocess_video",
    "track",
    "track_baseline",
    "visualize",
]
