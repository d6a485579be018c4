"""Preprocessing: from a video to the store of frames, masks, flow, evidence and landmarks.

`prepare` (in `preprocess.pipeline`) is all that the rest of `omni` uses; the fit reads the store
that it leaves, never its objects. It is imported on first use, so that flow can be computed on a
machine without the libraries that read and write videos.

May import `omni.errors`, `omni.config`, `omni.maths`, `omni.system`, `omni.video` and `omni.store`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preprocess.pipeline import prepare

__all__ = ["prepare"]


def __getattr__(name: str) -> object:
    if name != "prepare":
        raise AttributeError(f"module 'preprocess' has no attribute {name!r}")
    from preprocess.pipeline import prepare

    return prepare
