"""Video to correspondences: see `prepare`."""

from preprocess.pipeline import prepare

__all__ = ["prepare"]
