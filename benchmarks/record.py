"""What every record of measurements holds beside them: the code and the machine."""

import os
import platform
import subprocess
from pathlib import Path

import cv2
import numpy as np
import torch

__all__ = ["commit", "machine"]


def commit() -> str:
    """Output of `git describe` in this checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def machine() -> dict[str, object]:
    """The machine and the versions with which the numbers were measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"opencv": cv2.__version__, "numpy": np.__version__}
    return {"platform": platform.platform(), "cores": os.cpu_count(), "gpu": gpu, **versions}
