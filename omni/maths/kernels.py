"""Weights that fall with a distance."""

import torch
from torch import Tensor

__all__ = ["gaussian"]

_LOWEST = -60.0
"""Least exponent: e^-60 adds nothing to a sum in single precision. Subnormal numbers, below e^-87,
take a CPU 40 to 80 times as long as others, here and in all products."""


def gaussian(squared: Tensor, width: float) -> Tensor:
    """`exp(-d^2 / (2 width^2))` of squared distances, and a negligible weight instead of zero."""
    return torch.exp((squared * (-0.5 / width**2)).clamp(min=_LOWEST))
