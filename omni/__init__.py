"""omni: the motion of every pixel, through the whole video.

    run = omni.optimize("video.mp4")                  # or omni.load("runs/video")
    tracks = run.tracks([[0, 120.5, 80.5]])           # (t, y, x), raster pixels of the video
    everything = run.dense(frame=0, stride=4)
    between = run.at(3.5)

Names are imported on first use, so that `import omni` and `omni --help` need no torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "OmniError": "errors",
    "Run": "run",
    "Tracks": "tracking",
    "export": "run",
    "fit": "run",
    "load": "run",
    "load_config": "config",
    "optimize": "run",
    "track": "run",
    "visualize": "run",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'omni' has no attribute {name!r}")
    return getattr(importlib.import_module(f"omni.{_HOMES[name]}"), name)
