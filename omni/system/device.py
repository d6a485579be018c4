"""The device that torch computes on."""

from typing import TYPE_CHECKING

from omni.errors import OmniError

if TYPE_CHECKING:
    import torch

__all__ = ["choose_device"]


def choose_device(name: str) -> "torch.device":
    """The torch device called `name`; auto: CUDA where there is one, else the CPU.

    Raises:
        OmniError: there is no such device, or it is not available.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OmniError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OmniError(
            "no CUDA device is available: use --set device=cpu, or a CUDA build of torch"
        )
    return device
