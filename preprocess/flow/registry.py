"""Selection of the flow provider of a run, and of finished flow that can be kept."""

import logging
from pathlib import Path

from omni.config import FlowConfig
from omni.errors import OmniError
from preprocess.flow.dis import DisFlow
from preprocess.flow.provider import FlowProvider
from preprocess.parallel import worker_count

__all__ = ["accepts", "resolve_provider"]

logger = logging.getLogger(__name__)


def resolve_provider(config: FlowConfig, device: str = "auto") -> FlowProvider:
    """The provider that `config.provider` names.

    `auto` takes RAFT where a CUDA device is used (on a CPU it needs seconds per pair) and its
    weights are given, cached or downloadable; otherwise DIS.

    Raises:
        OmniError: RAFT is required and its weights cannot be had.
    """
    dis = DisFlow(worker_count(config.workers))
    if config.provider == "dis":
        return dis
    import torch  # the DIS path does without

    from preprocess.flow.raft import RaftFlow, find_weights

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.provider == "auto" and not device.startswith("cuda"):
        logger.info("flow: DIS (no CUDA device for RAFT)")
        return dis
    try:
        weights = find_weights(config.raft, config.weights)
        raft = RaftFlow(weights, device)
    except OmniError as error:
        if config.provider == "raft" or config.weights:
            raise
        logger.info("flow: DIS (%s)", error)
        return dis
    kind = f"RAFT-{weights.variant}, {weights.origin} weights"
    logger.info("flow: %s (%s) on %s", kind, weights.path, device)
    return raft


def accepts(config: FlowConfig, name: str) -> bool:
    """Whether finished flow by the provider called `name` satisfies `config`.

    Under `auto` finished flow of either kind is kept: a run made on a GPU machine can be
    continued anywhere, without weights, without a network, and without the file `config.weights`.
    """
    if config.provider != "raft" and name == DisFlow.name:
        return True
    from preprocess.flow.raft import weights_digest

    gone = bool(config.weights) and not Path(config.weights).is_file()
    raft = f"raft-{config.raft}-{'' if gone else weights_digest(config.weights)}"
    kept = config.provider != "dis" and name.startswith(raft)
    if kept and gone:
        logger.warning("flow.weights %s is gone: keeping finished %s", config.weights, name)
    return kept
