"""Video to correspondences: see `prepare`.

It is imported on first use, so that the flow network can be trained and judged on a machine
without what reads and writes videos.
"""

__all__ = ["prepare"]


def __getattr__(name: str) -> object:
    if name != "prepare":
        raise AttributeError(f"module 'preprocess' has no attribute {name!r}")
    from preprocess.pipeline import prepare

    return prepare
