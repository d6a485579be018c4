"""Flow of every scheduled pair, near pairs first; far ones start from composed near ones."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from omni.maths import decode_flow, encode_flow
from omni.system import Stage
from preprocess.flow.pairs import halfway
from preprocess.flow.provider import FlowProvider, ImagePair
from preprocess.flow.warp import compose
from preprocess.parallel import run_items

__all__ = ["compute_flows", "levels_by_gap"]


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

    def inputs(k: int) -> ImagePair:
        source, target = map(int, pairs[k])
        middle = halfway(source, target)
        flow_init = None
        if middle != source:
            first, second = index[source, middle], index[middle, target]
            flow_init = compose(decode_flow(flow[first]), decode_flow(flow[second]))
        return np.asarray(frames[source]), np.asarray(frames[target]), flow_init

    def work(group: Sequence[int]) -> None:
        estimated = provider.estimate_batch(list(map(inputs, group)))
        for k, values in zip(group, estimated, strict=True):
            flow[k] = encode_flow(values)

    run_items(stage, levels_by_gap(pairs), work, provider.workers, bar, provider.batch)
