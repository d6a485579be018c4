"""Save and load everything that a fit needs to continue exactly, and a field to be read."""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch

from omni.config import Config, parse_config
from omni.errors import DamagedError, OmniError
from omni.field.model import Field
from omni.system import check_archive, out_of_memory, write_atomic

__all__ = [
    "FORMAT_VERSION",
    "fit_progress",
    "is_count",
    "load_checkpoint",
    "load_field",
    "restore_optimizer",
    "save_checkpoint",
]

FORMAT_VERSION = 1

_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Byte", "Int", "Long", "Float", "Double", "Bool")),
}
"""Everything that our checkpoints refer to. torch's safe unpickler accepts more, for instance
`bytearray(n)`, which allocates as much memory as the file requests."""


_RENAMED_MEASURES = {"astray": "outliers"}
"""Today's names of held-out measures by those that older versions wrote."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values only) atomically.

    Raises:
        OmniError: the file cannot be written; the last checkpoint is still there.
    """
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without executing anything in it; every byte is checked.

    Raises:
        OmniError: missing, or written in another format.
        DamagedError: not as it was written.
    """
    if not path.is_file():
        raise OmniError(f"{path} does not exist: run `omni optimize` or `omni fit` first")
    try:
        _check(path)
        state = torch.load(path, map_location=device, weights_only=True)
        version = state.get("format_version") if isinstance(state, dict) else None
    except OmniError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in its readers
        if out_of_memory(error):
            raise
        raise DamagedError(f"{path} is damaged: delete it and run `omni fit` again") from None
    if type(version) is not int or version != FORMAT_VERSION:  # a tensor compares to a tensor
        raise OmniError(
            f"{path} was written by another version (format {version!r:.20}, this omni reads "
            f"{FORMAT_VERSION}): use that version, or delete it and run `omni fit`"
        )
    return _under_new_names(state)


def _under_new_names(state: dict[str, Any]) -> dict[str, Any]:
    """The state, with the held-out measures that older versions wrote under today's names."""
    for part in (state, state.get("good")):
        history = part.get("history") if isinstance(part, dict) else None
        for entry in history if isinstance(history, list) else []:
            if isinstance(entry, dict):
                renamed = {_RENAMED_MEASURES.get(key, key): entry[key] for key in entry}
                entry.clear()
                entry.update(renamed)
    return state


def load_field(path: Path, num_frames: int, device: torch.device) -> tuple[Field, Config, int]:
    """The fitted field of a checkpoint on its device, the settings it was fitted with, its step.

    Raises:
        OmniError: as `load_checkpoint`; or of a video with another number of frames, or its parts
            do not fit each other.
    """
    state = load_checkpoint(path)  # on the CPU: the optimizer's part is of no use elsewhere
    damaged = DamagedError(f"{path} does not fit itself: delete it and run `omni fit` again")
    try:
        config = parse_config(state["config"], str(path))
        frames, step, weights = state["num_frames"], state["step"], state["field"]
        # The bytes stored, not those declared: an expanded tensor may declare any size.
        storages = [value.untyped_storage() for value in weights.values()]
        held = sum({part.data_ptr(): part.nbytes() for part in storages}.values())
        if not is_count(step):
            raise damaged
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        raise damaged from None
    if frames != num_frames:
        raise OmniError(
            f"{path} belongs to a video of {frames!r:.20} frames, the run's has {num_frames}: "
            "run `omni fit`"
        )
    # Settings are text and may describe a field of any size: first build it without any memory.
    with torch.device("meta"):
        declared = sum(p.nbytes for p in Field(frames, config.model, config.render).parameters())
    if declared > 2 * held:
        raise damaged
    try:
        field = Field(frames, config.model, config.render, device.type == "cuda")
        field.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise damaged from None
    return field.to(device).eval(), config, step


def fit_progress(checkpoint: Path, key: str) -> tuple[int, bool]:
    """Step a fit of this key has reached, and whether it is finished."""
    if not checkpoint.is_file():
        return 0, False
    try:
        state = load_checkpoint(checkpoint)
    except DamagedError:
        return 0, False
    step, finished = state.get("step"), state.get("finished")
    if state.get("key") == key and is_count(step) and type(finished) is bool:
        return step, finished
    return 0, False


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an untrusted Adam's state into one of the same parameters, which keeps its settings.

    torch checks no shapes, and its fused step writes wherever a parameter's own shape leads.

    Raises:
        ValueError: the state of a parameter is not of its shape, or of one that does not exist.
    """
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in saved["state"].items():
        if not is_count(index) or index >= len(parameters):
            raise ValueError("state of a parameter that does not exist")
        moments = entry["exp_avg"], entry["exp_avg_sq"]
        for moment in moments:
            same = moment.shape == parameters[index].shape and moment.is_contiguous()
            if not same or moment.dtype != parameters[index].dtype:
                raise ValueError("state that does not fit its parameter")
        if len(entry) != 3 or entry["step"].numel() != 1:
            raise ValueError("state that is not Adam's")
    optimizer.load_state_dict({**own, "state": saved["state"]})


def is_count(value: Any) -> TypeGuard[int]:
    """Whether an untrusted value can be a number of steps or the like."""
    return type(value) is int and 0 <= value < 1 << 40


def _check(path: Path) -> None:
    """Check what torch does not: checksums, names, and what the archive unpacks to.

    Raises:
        ValueError: damaged, compressed, or with references that no checkpoint of ours has.
    """
    with check_archive(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            if member.filename.endswith(".pkl"):
                for opcode, name, _ in pickletools.genops(archive.read(member)):
                    if opcode.name in ("GLOBAL", "INST") and name not in _NAMES:
                        raise ValueError(f"{name} is not allowed")
                    if opcode.name == "STACK_GLOBAL":
                        raise ValueError("names must be plain")
        if archive.testzip() is not None:
            raise ValueError("a checksum differs")
