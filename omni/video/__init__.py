"""Video and image files: reading frames and masks, writing H.264.

May import `omni.errors` and `omni.system`.
"""

from omni.video.masks import load_masks
from omni.video.source import VideoSource, open_video
from omni.video.writing import check_codecs, write_video

__all__ = ["VideoSource", "check_codecs", "load_masks", "open_video", "write_video"]
