"""Visualisation: track overlays, pictures of flow and depth, TensorBoard.

May import `omni.tracking`, `omni.field` and the packages below them.
"""

from omni.views.board import Board, serve
from omni.views.overlay import draw_tracks
from omni.views.pictures import depth_to_image
from omni.views.summaries import Summaries
from omni.views.videos import render_videos

__all__ = ["Board", "Summaries", "depth_to_image", "draw_tracks", "render_videos", "serve"]
