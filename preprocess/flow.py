"""Flow of every scheduled pair, near pairs first; far ones start from composed near ones."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from omni.config import FlowConfig
from omni.errors import OmniError
from omni.store import Evidence, Stage, decode_flow, encode_flow, pack_evidence
from preprocess.dis import DisFlow
from preprocess.motion import Motion
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
        workers: how many `estimate` or `estimate_batch` calls may run at the same time.
        batch: how many pairs `estimate_batch` is best given at once.
        judges: whether its motions carry `hidden` and `sigma`.
    """

    name: str
    workers: int
    batch: int
    judges: bool

    def estimate(
        self, image1: np.ndarray, image2: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Flow `(h, w, 2)` float32 pixels between two `(h, w, 3)` uint8 RGB images.

        `start` is a first guess in pixels, None for adjacent frames. The result depends on the
        arguments alone.
        """
        ...

    def estimate_batch(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    ) -> list[Motion]:
        """Motion of each `(image1, image2, start)`, all of one size; flow as by `estimate`."""
        ...


def resolve_provider(config: FlowConfig, device: str = "auto") -> FlowProvider:
    """The provider that `config.provider` asks for.

    `auto` takes RAFT where a CUDA device is used (on a CPU it needs seconds per pair) and its
    weights are given, cached, downloadable or part of this build; otherwise DIS.

    Raises:
        OmniError: RAFT is asked for and its weights cannot be had.
    """
    dis = DisFlow(config.refine, worker_count(config.workers))
    if config.provider == "dis":
        return dis
    import torch  # the DIS path does without

    from preprocess.raft import RaftFlow, find_weights

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
    """Whether flow by the provider called `name` is what `config` asks for.

    Under `auto` finished flow of either kind is kept: a run made on a GPU machine goes on
    anywhere, and none of it needs weights or a network again, nor `config.weights` where that
    file stayed behind.
    """
    if config.provider != "raft" and name == DisFlow(config.refine).name:
        return True
    gone = bool(config.weights) and not Path(config.weights).is_file()
    raft = [f"raft-{config.raft}-{'' if gone else weights_digest(config.weights)}"]
    if not config.weights:
        raft.append("raft-embedded-")
    kept = config.provider != "dis" and name.startswith(tuple(raft))
    if kept and gone:
        logger.warning("flow.weights %s is gone: keeping finished %s", config.weights, name)
    return kept


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
    the same bytes as an uninterrupted one. What a provider says about its own flow goes to
    `stage.arrays["doubt"]` `(K, h, w)` (see `omni.store`).
    """
    flow = stage.arrays["flow"]
    index = {(int(i), int(j)): k for k, (i, j) in enumerate(pairs)}

    def request(k):
        source, target = map(int, pairs[k])
        middle = halfway(source, target)
        start = None
        if middle != source:
            first, second = index[source, middle], index[middle, target]
            start = compose(decode_flow(flow[first]), decode_flow(flow[second]))
        return np.asarray(frames[source]), np.asarray(frames[target]), start

    def work(group):
        for k, motion in zip(
            group, provider.estimate_batch(list(map(request, group))), strict=True
        ):
            flow[k] = encode_flow(motion.flow)
            if provider.judges:
                certain = np.ones(motion.hidden.shape, bool)
                doubt = Evidence(motion.sigma, motion.hidden > 0.5, certain)
                stage.arrays["doubt"][k] = pack_evidence(doubt)

    run_items(stage, levels_by_gap(pairs), work, provider.workers, bar, provider.batch)
