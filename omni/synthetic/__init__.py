"""Generated clips whose motion, visibility and flow are known exactly.

`clip` renders the scenes of `scenes` and follows their points, `camera_effects` adds what a camera
and a codec do to a picture.

May import `omni.errors`, `omni.system` and `omni.maths`.
"""

from omni.synthetic.camera_effects import compress, expose, filmed_frames
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
    "compress",
    "expose",
    "filmed_frames",
    "make_clip",
    "noise",
    "planks",
    "plaster",
    "stones",
    "stripes",
]
