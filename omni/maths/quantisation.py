"""How flow and its evidence are packed into integers on disk."""

from dataclasses import dataclass
from typing import Generic

import numpy as np

from omni.maths.coords import Array

__all__ = [
    "FLOW_SCALE",
    "Evidence",
    "decode_flow",
    "encode_flow",
    "pack_evidence",
    "unpack_evidence",
]

FLOW_SCALE = 32
"""int16 flow is pixels x 32: steps of 1/32 pixel up to 1023 pixels."""

_LEVELS = 12.0
_ERROR_BITS, _OCCLUDED_BIT, _VALID_BIT = 0x3F, 0x40, 0x80


def encode_flow(flow: np.ndarray) -> np.ndarray:
    """Flow in pixels (float) to int16 fixed point; longer than 1023 pixels saturates."""
    return np.clip(np.rint(flow * FLOW_SCALE), -32767, 32767).astype(np.int16)


def decode_flow(code: np.ndarray) -> np.ndarray:
    """Inverse of `encode_flow`: float32 pixels."""
    return code.astype(np.float32) / FLOW_SCALE


@dataclass(frozen=True)
class Evidence(Generic[Array]):
    """Results of the consistency checks for each pixel of a flow; arrays of one shape.

    error: forward-backward error in pixels (saturates at 9.3).
    occluded: the first cycle fails, the second closes, the target lies inside: the point is
        hidden in the target frame and the flow still plausible (OmniMotion's double cycle).
    valid: the target lies inside the frame, on the same side of every cut, on the same mask label.
    """

    error: Array
    occluded: Array
    valid: Array


def pack_evidence(evidence: Evidence[np.ndarray]) -> np.ndarray:
    """One byte per pixel: 6 bits of log-quantised error, 1 bit occluded, 1 bit valid.

    `code = round(12 log2(1 + 4 error))`: steps of 0.04 px at 0.5 px, 0.1 px at 1.5 px.
    """
    code = np.rint(_LEVELS * np.log2(1 + 4 * np.maximum(evidence.error, 0)))
    code = np.minimum(np.nan_to_num(code, nan=_ERROR_BITS), _ERROR_BITS).astype(np.uint8)
    return (
        code
        | (evidence.occluded * np.uint8(_OCCLUDED_BIT))
        | (evidence.valid * np.uint8(_VALID_BIT))
    )


def unpack_evidence(code: Array) -> Evidence[Array]:
    """Inverse of `pack_evidence`, up to the quantisation of the error: `(...)` uint8 to `(...)`."""
    exponent = (code & _ERROR_BITS) / _LEVELS
    return Evidence(
        error=(2**exponent - 1) / 4,
        occluded=(code & _OCCLUDED_BIT) > 0,
        valid=(code & _VALID_BIT) > 0,
    )
