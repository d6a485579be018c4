"""The field of one video and its fit: what is optimised, from what, by which losses.

`model/` holds bijections, canonical volume and rendering; the modules beside it sample
correspondences, compare them with the model and run the optimisation. May import `omni.maths`,
`omni.config`, `omni.store` and `omni.system`; does not depend on `omni.tracking`.
"""

from omni.field.checkpoint import (
    fit_progress,
    is_count,
    load_checkpoint,
    load_field,
    restore_optimizer,
    save_checkpoint,
)
from omni.field.initialisation import global_motion
from omni.field.model import Field, Rays, RealNVP
from omni.field.sampling import LongTracks
from omni.field.trainer import Trainer, fit_key
from omni.field.update import CapturedUpdate

__all__ = [
    "CapturedUpdate",
    "Field",
    "LongTracks",
    "Rays",
    "RealNVP",
    "Trainer",
    "fit_key",
    "fit_progress",
    "global_motion",
    "is_count",
    "load_checkpoint",
    "load_field",
    "restore_optimizer",
    "save_checkpoint",
]
