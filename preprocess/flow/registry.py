"""Selection of the flow provider of a run, and of finished flow that can be kept."""

import logging
from importlib.metadata import entry_points
from pathlib import Path

from omni.config import FlowConfig
from omni.errors import OmniError
from preprocess.flow.dis import DisFlow
from preprocess.flow.provider import FlowProvider
from preprocess.flow.weights import find_weights, weights_digest
from preprocess.parallel import worker_count

__all__ = ["ENTRY_POINTS", "accepts", "resolve_provider"]

logger = logging.getLogger(__name__)

ENTRY_POINTS = "omni.flow"
"""Group in which installed packages offer flow providers: a name that `flow.provider` may take,
and a function `(config: FlowConfig, device: str) -> FlowProvider`. What it returns is called by
that name, or by it, a hyphen and whatever identifies its settings and weights."""


def resolve_provider(config: FlowConfig, device: str = "auto") -> FlowProvider:
    """The provider that `config.provider` names.

    `auto` takes RAFT where a CUDA device is used (on a CPU it needs seconds per pair) and its
    weights are given, cached or downloadable; otherwise DIS.

    Raises:
        OmniError: there is none of that name, or its weights cannot be had.
    """
    if config.provider == "dis":
        return DisFlow(worker_count(config.workers))
    import torch  # the DIS path does without

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.provider == "auto":
        return _automatic(config, device)
    if config.provider == "raft":
        return _raft(config, device)
    if config.provider == "gmflow":
        return _gmflow(config, device)
    if config.provider == "mixed":
        return DisFlow(worker_count(config.workers), _gmflow(config, device, refine=False))
    return _offered(config, device)


def accepts(config: FlowConfig, name: str) -> bool:
    """Whether finished flow by the provider called `name` satisfies `config`.

    Under `auto` finished flow of either kind is kept: a run made on a GPU machine can be
    continued anywhere, without weights, without a network, and without the file `config.weights`.
    """
    if config.provider in ("auto", "dis") and name == DisFlow.name:
        return True
    if config.provider not in ("auto", "raft", "gmflow", "mixed"):
        return name == config.provider or name.startswith(f"{config.provider}-")
    gone = bool(config.weights) and not Path(config.weights).is_file()
    networks = {"gmflow": "gmflow", "mixed": "mixed-gmflow"}
    network = networks.get(config.provider, f"raft-{config.raft}")
    kept = name.startswith(f"{network}-{'' if gone else weights_digest(config.weights)}")
    if kept and gone:
        logger.warning("flow.weights %s is gone: keeping finished %s", config.weights, name)
    return kept


def _automatic(config: FlowConfig, device: str) -> FlowProvider:
    """RAFT on a GPU where its weights can be had, else DIS."""
    dis = DisFlow(worker_count(config.workers))
    if not device.startswith("cuda"):
        logger.info("flow: DIS (no CUDA device for RAFT)")
        return dis
    try:
        return _raft(config, device)
    except OmniError as error:
        if config.weights:
            raise
        logger.info("flow: DIS (%s)", error)
        return dis


def _raft(config: FlowConfig, device: str) -> FlowProvider:
    from preprocess.flow.raft import RaftFlow

    weights = find_weights(f"raft-{config.raft}", config.weights)
    raft = RaftFlow(weights, device)
    kind = f"RAFT-{config.raft}, {weights.origin} weights"
    logger.info("flow: %s (%s) on %s", kind, weights.path, device)
    return raft


def _gmflow(config: FlowConfig, device: str, refine: bool = True) -> FlowProvider:
    from preprocess.flow.gmflow import GmFlow

    weights = find_weights("gmflow", config.weights)
    gmflow = GmFlow(weights, device, refine)
    kind = "GMFlow" if refine else "DIS, and GMFlow as a further start"
    logger.info("flow: %s, %s weights (%s) on %s", kind, weights.origin, weights.path, device)
    return gmflow


def _offered(config: FlowConfig, device: str) -> FlowProvider:
    """A provider that an installed package offers under ENTRY_POINTS."""
    name, offered = config.provider, entry_points(group=ENTRY_POINTS)
    for point in offered:
        if point.name == name:
            try:
                provider: FlowProvider = point.load()(config, device)
            except OmniError:
                raise
            except Exception as error:  # whatever another package raises
                raise OmniError(
                    f"the flow provider {name} ({point.value}) could not be made "
                    f"({type(error).__name__}: {error}): repair its package, or choose another "
                    "flow.provider"
                ) from error
            logger.info("flow: %s (%s) on %s", provider.name, point.value, device)
            return provider
    known = ["auto", "dis", "gmflow", "mixed", "raft", *sorted(offered.names)]
    raise OmniError(
        f"there is no flow provider {name!r}: set flow.provider to one of {', '.join(known)}, or "
        f"install a package that offers it (entry points {ENTRY_POINTS})"
    )
