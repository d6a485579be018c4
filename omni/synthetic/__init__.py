"""Generated clips whose motion, visibility and flow are known exactly.

May import `omni.errors`, `omni.system` and `omni.maths`.
"""

from omni.synthetic.clip import SyntheticClip, make_clip
from omni.synthetic.scenes import SCENES
from omni.synthetic.textures import (
    SIDE,
    Texture,
    blobs,
    bricks,
    noise,
    planks,
    plaster,
    stones,
    stripes,
)

__all__ = [
    "SCENES",
    "SIDE",
    "SyntheticClip",
    "Texture",
    "blobs",
    "bricks",
    "make_clip",
    "noise",
    "planks",
    "plaster",
    "stones",
    "stripes",
]
