"""The quasi-3D field of OmniMotion's method section: tensors in, tensors out.

No files and no choice of device. May import `omni.maths` and the sizes in `omni.config`.
"""

from omni.field.model.bijection import Coupling, GaborCode, GlobalMotion, RealNVP, SplineCode
from omni.field.model.canonical import CanonicalVolume
from omni.field.model.field import Field, Rays, SurfaceMap
from omni.field.model.networks import GridEncoding, grid_encoding
from omni.field.model.rendering import FAR, NEAR, composite, distortion

__all__ = [
    "CanonicalVolume",
    "Coupling",
    "FAR",
    "Field",
    "GaborCode",
    "GlobalMotion",
    "GridEncoding",
    "NEAR",
    "Rays",
    "RealNVP",
    "SplineCode",
    "SurfaceMap",
    "composite",
    "distortion",
    "grid_encoding",
]
