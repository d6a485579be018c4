"""Flow of every scheduled pair, near pairs first; far ones start from composed near ones."""

import hashlib
import logging
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from omni.config import FlowConfig
from omni.errors import OmniError
from omni.store import Stage, decode_flow, encode_flow
from preprocess.dis import DisFlow
from preprocess.pairs import halfway
from preprocess.parallel import run_items, worker_count
from preprocess.warp import compose

__all__ = [
    "FlowProvider",
    "accepts",
    "compute_flows",
    "levels_by_gap",
    "resolve_provider",
    "weights_digest",
]

logger = logging.getLogger(__name__)


class FlowProvider(Protocol):
    """Anything that maps two images to a dense flow.

    Attributes:
        name: identifies the method, its settings and its weights.
        workers: how many `estimate` calls may run at the same time.
    """

    name: str
    workers: int

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels between two `(h, w, 3)` uint8 RGB images.

        `start` is a first guess in pixels, None for adjacent frames. The result depends on the
        arguments alone.
        """
        ...


def resolve_provider(config: FlowConfig, device: str = "auto") -> FlowProvider:
    """The provider that `config.provider` asks for.

    `auto` takes RAFT where a CUDA device is used (on a CPU it needs seconds per pair) and its
    weights are given, cached or downloadable; otherwise DIS.

    Raises:
        OmniError: RAFT is asked for and its weights cannot be had.
    """
    dis = DisFlow(config.refine, worker_count(config.workers))
    if config.provider == "dis":
        return dis
    import torch  # the DIS path does without

    from preprocess.raft import RaftFlow

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.provider == "auto" and not device.startswith("cuda"):
        logger.info("flow: DIS (no CUDA device for RAFT)")
        return dis
    try:
        raft = RaftFlow(config.raft, config.weights, device)
    except OmniError as error:
        if config.provider == "raft" or config.weights:
            raise
        logger.info("flow: DIS (%s)", error)
        return dis
    logger.info("flow: %s on %s", raft.name, device)
    return raft


def accepts(config: FlowConfig, name: str) -> bool:
    """Whether flow by the provider called `name` is what `config` asks for.

    Under `auto` finished flow of either kind is kept: a run made on a GPU machine goes on
    anywhere, and none of it needs weights or a network again.
    """
    dis = DisFlow(config.refine).name
    raft = f"raft-{config.raft}-{weights_digest(config.weights)}"
    return (config.provider != "raft" and name == dis) or (
        config.provider != "dis" and name.startswith(raft)
    )


def weights_digest(path: str) -> str:
    """Short hash of a weights file's content, empty for no path.

    Raises:
        OmniError: there is no such file.
    """
    if not path:
        return ""
    if not Path(path).is_file():
        raise OmniError(f"flow.weights {path} is not a file: give a RAFT .pth or .safetensors file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def levels_by_gap(pairs: np.ndarray) -> list[list[int]]:
    """Indices of `pairs` `(K, 2)` grouped by gap, near first: a level needs only those before."""
    gaps = np.abs(pairs[:, 1] - pairs[:, 0])
    return [np.flatnonzero(gaps == gap).tolist() for gap in np.unique(gaps)]


def compute_flows(
    frames: np.ndarray, pairs: np.ndarray, provider: FlowProvider, stage: Stage, bar: tqdm
) -> None:
    """Fill `stage.arrays["flow"]` `(K, h, w, 2)` for `pairs` `(K, 2)` of `frames` `(T, h, w, 3)`.

    Far flows start from near ones as stored, quantised, so that an interrupted run continues to
    the same bytes as an uninterrupted one.
    """
    flow = stage.arrays["flow"]
    index = {(int(i), int(j)): k for k, (i, j) in enumerate(pairs)}

    def work(k):
        source, target = map(int, pairs[k])
        middle = halfway(source, target)
        start = None
        if middle != source:
            first, second = index[source, middle], index[middle, target]
            start = compose(decode_flow(flow[first]), decode_flow(flow[second]))
        images = np.asarray(frames[source]), np.asarray(frames[target])
        flow[k] = encode_flow(provider.estimate(*images, start))

    run_items(stage, levels_by_gap(pairs), work, provider.workers, bar)
