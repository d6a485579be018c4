"""Save and load everything a fit needs to continue exactly, or to answer queries."""

import io
from pathlib import Path
from typing import Any

import torch

from omni.errors import OmniError
from omni.files import write_atomic

__all__ = ["FORMAT_VERSION", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values only) atomically.

    Raises:
        OmniError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise OmniError(
            f"cannot write {path} ({error.strerror}): free some disk space and run again, "
            "the last checkpoint is still there"
        ) from None


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        OmniError: missing, damaged, or written in another format.
    """
    if not path.is_file():
        raise OmniError(f"{path} does not exist: run `omni optimize` or `omni fit` first")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # a damaged file can fail anywhere in the unpickler
        raise OmniError(f"{path} is damaged: delete it and run `omni fit` again") from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise OmniError(f"{path} was written by another version: delete it and run `omni fit`")
    return state
