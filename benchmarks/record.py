"""What every record of measurements holds beside them: the code and the machine."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

__all__ = ["commit", "machine", "markdown", "write_record"]


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


def write_record(path: Path, **content: object) -> None:
    """Write measurements as JSON, atomically, with commit, command line and machine before them.

    Args:
        path: file to write; its folder is made where missing.
        content: what was measured, by name; no infinite numbers.
    """
    from omni.system import write_atomic

    record = {"commit": commit(), "command": sys.argv[1:], "machine": machine(), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1, allow_nan=False).encode())


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None shows as `-`."""
    lines = [columns, ["---"] * len(columns)]
    lines += [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
