"""Which ordered pairs of frames get a flow."""

from collections.abc import Sequence

import numpy as np

__all__ = ["halfway", "schedule"]


def schedule(num_frames: int, kind: str, max_gap: int, cuts: Sequence[int] = ()) -> np.ndarray:
    """Ordered pairs `(K, 2)` int64 (source, target), near ones first, no pair across a cut.

    Every pair comes with its reverse, and the two halves of a far pair (see `halfway`) come
    before it, so that far flows can start from the composition of near ones.

    Args:
        num_frames: T.
        kind: `log` for gaps 1, 2, 4, ... up to `max_gap` (about 2 T log2 max_gap pairs),
            `exhaustive` for all T (T - 1) pairs.
        max_gap: longest gap of `log` in frames; at least 1 is used.
        cuts: first frames of new shots.
    """
    shot = np.searchsorted(
        np.sort(np.asarray(cuts, dtype=np.int64)), np.arange(num_frames), "right"
    )
    pairs = [np.empty((0, 2), np.int64)]
    for gap in _gaps(num_frames, kind, max_gap):
        source = np.arange(num_frames - gap)
        source = source[shot[source] == shot[source + gap]]
        both = [[source, source + gap], [source + gap, source]]
        pairs.append(np.array(both, np.int64).transpose(2, 0, 1).reshape(-1, 2))
    return np.concatenate(pairs)


def halfway(source: int, target: int) -> int:
    """The frame between two frames at which their flow is composed; `source` when adjacent."""
    gap = target - source
    return source + (abs(gap) // 2) * (1 if gap > 0 else -1)


def _gaps(num_frames: int, kind: str, max_gap: int) -> list[int]:
    if kind == "exhaustive":
        return list(range(1, num_frames))
    return [2**k for k in range(max(1, max_gap).bit_length()) if 2**k < num_frames]
