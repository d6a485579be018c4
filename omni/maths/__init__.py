"""Numbers only: coordinates, splines, camera motion, and how flow and evidence are quantised.

May import numpy, scipy, torch and nothing of ours. Everything else may import this.
"""

from omni.maths.camera import REFERENCE_SIDE, Camera
from omni.maths.coords import (
    denormalize,
    grid_queries,
    inside,
    normalize,
    pixel_centers,
    processing_size,
    rescale,
    sample_image,
)
from omni.maths.kernels import gaussian
from omni.maths.quantisation import (
    FLOW_SCALE,
    Evidence,
    decode_flow,
    encode_flow,
    pack_evidence,
    unpack_evidence,
)
from omni.maths.splines import bspline_weights, catmull_rom_weights, num_control_points, table_at

__all__ = [
    "Camera",
    "Evidence",
    "FLOW_SCALE",
    "REFERENCE_SIDE",
    "bspline_weights",
    "catmull_rom_weights",
    "decode_flow",
    "denormalize",
    "encode_flow",
    "gaussian",
    "grid_queries",
    "inside",
    "normalize",
    "num_control_points",
    "pack_evidence",
    "pixel_centers",
    "processing_size",
    "rescale",
    "sample_image",
    "table_at",
    "unpack_evidence",
]
