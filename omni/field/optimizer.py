"""The optimizer of a field: one group of parameters, with a learning rate of its own, per part."""

import torch

from omni.config import OptimConfig
from omni.field.model import Field

__all__ = ["make_optimizer"]


def make_optimizer(field: Field, optim: OptimConfig) -> torch.optim.Optimizer:
    """Adam over every parameter of `field`.

    Args:
        field: on the device where it is fitted.
        optim: learning rates `lr_NAME` and betas.

    Returns:
        Groups by `name`, whose unscheduled learning rate is `base`.
    """
    code = list(field.bijection.code.parameters())
    known = {id(p) for p in code}
    motion = field.motion if field.planes is None else field.planes
    groups = {
        "mapping": [p for p in field.bijection.parameters() if id(p) not in known],
        "code": code,
        "canonical": list(field.volume.parameters()),
        "surface": list(field.surface.parameters()) if field.surface is not None else [],
        "motion": list(motion.parameters()) if motion is not None else [],
    }
    return torch.optim.Adam(
        [
            {"params": parameters, "name": name, "base": getattr(optim, f"lr_{name}")}
            for name, parameters in groups.items()
            if parameters
        ],
        betas=optim.betas,
        fused=True,
        capturable=code[0].is_cuda,
    )
