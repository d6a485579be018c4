"""Training the flow network on generated pairs. A package of its own: nothing else imports it.

May import `preprocess.flow` and `omni` up to `omni.field`, for checkpoints.
"""

from preprocess.training.pairs import FlowPairs, PairSource
from preprocess.training.raft_trainer import RaftTrainer, Recipe
from preprocess.training.random_scenes import draw_scenes
from preprocess.training.sensor import expose
from preprocess.training.textures import TextureBank

__all__ = [
    "FlowPairs",
    "PairSource",
    "RaftTrainer",
    "Recipe",
    "TextureBank",
    "draw_scenes",
    "expose",
]
