"""The candidate selection network: scores all candidates of a point, frame by frame.

Its input are the features of each candidate (see `omni.tracking.selection.features`). Features are
encoded per candidate, pooled over the candidates at nearby positions, so that a position is scored
by the evidence of all candidates near it, and decoded to one score per candidate. For the position
selected it predicts P(visible), the trust P(visible and within 6 px), and log sigma. Each point
and frame is predicted on its own; `omni.tracking.fusion.smoothed_path` joins them to tracks.

The weights are data, `omni/tracking/selection/network.safetensors`, trained on generated clips by
`scripts/train_selection.py`.

Letters: K candidates, N points, T frames, F features, H width, B rows (points and frames),
R pooling radii.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from omni.maths import gaussian
from omni.tracking.confidence import Confidence, median_filtered
from omni.tracking.selection.candidates import FUSED, Candidates

__all__ = [
    "Selection",
    "SelectionNetwork",
    "TRUST_THRESHOLD",
    "load_network",
    "pool_neighbours",
    "select_candidates",
    "select_rows",
    "trained_network",
]

AVERAGING_RADIUS = 4.0
"""Pixels, at a short side of 256, within which candidates are averaged with the best one: the mean
of two different tracks lies on neither of them."""

POOL_RADII = (1.0, 3.0, 10.0)
"""Standard deviations of the Gaussian windows of pooling, pixels at a short side of 256."""

TRUST_THRESHOLD = 0.4
"""Least P(visible and within 6 px) of a point called visible: J / (1 + J) is best for AJ at a
Jaccard index J of 0.67."""

ROWS = 2**8
"""Points and frames that go through the network at once."""

_PATH = Path(__file__).with_name("network.safetensors")


@dataclass
class Selection:
    """The selected positions of N points in T frames and their predicted confidence.

    Attributes:
        xy: (N, T, 2) float32 processing pixels.
        trust: (N, T) probability that the point is visible and the position within 6 px.
        visibility: (N, T) probability that the point is visible.
        sigma: (N, T) standard deviation per axis, processing pixels.
    """

    xy: np.ndarray
    trust: np.ndarray
    visibility: np.ndarray
    sigma: np.ndarray

    def confidence(self) -> Confidence:
        """As users see it: the median over three frames of trust exceeds TRUST_THRESHOLD."""
        visible = median_filtered(self.trust) > TRUST_THRESHOLD
        return Confidence(self.visibility, self.sigma, visible)

    @classmethod
    def joined(cls, parts: list["Selection"]) -> "Selection":
        """The selections of all parts, point after point, as one."""
        values = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(each) for each in values))


class SelectionNetwork(nn.Module):
    """Scores candidates from their features and their neighbours'.

    Every candidate is encoded by the same layers. Its code is combined with the codes pooled over
    the candidates around it, and scored in the context of the mean, the maximum and the fused
    path's code. As all this is invariant to the order of candidates (but for the fused path), any
    number of them is possible.

    Args:
        count: F.
        width: H.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, count: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.ones(count))
        self.encode = nn.Sequential(
            nn.Linear(count, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.mix_self, self.mix_pooled = (
            nn.Linear(width, width),
            nn.Linear(len(POOL_RADII) * width, width),
        )
        self.score_self, self.score_context = nn.Linear(width, width), nn.Linear(3 * width, width)
        self.score = nn.Linear(width, 1)
        self.head = nn.Sequential(nn.Linear(4 * width, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, values: Tensor, valid: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Score candidates and predict the confidence of the position selected.

        Args:
            values: (B, K, F) features.
            valid: (B, K) bool; the fused path is always valid.
            xy: (B, K, 2) positions, pixels at a short side of 256, from any origin.

        Returns:
            (B, K) scores, -inf where not valid, and (B, 3): logits of trust and of visibility, and
            log sigma in pixels at a short side of 256.
        """
        code = self.encode((values - self.mean) / self.std)
        own = self.mix_self(code)
        code = code + F.silu(own + self.mix_pooled(pool_neighbours(code, valid, xy)))
        known = valid[..., None]
        mean = (code * known).sum(1) / known.sum(1)
        maximum = code.masked_fill(~known, -torch.inf).amax(1)
        context = torch.cat([mean, maximum, code[:, FUSED]], dim=-1)
        hidden = F.silu(self.score_self(code) + self.score_context(context)[:, None])
        score = self.score(hidden)[..., 0].masked_fill(~valid, -torch.inf)
        selected = (score.softmax(-1)[..., None] * code).sum(1)
        return score, self.head(torch.cat([selected, context], dim=-1))


def pool_neighbours(code: Tensor, valid: Tensor, xy: Tensor) -> Tensor:
    """Mean codes of the valid candidates around each, in Gaussian windows of all POOL_RADII.

    Args:
        code: (B, K, H).
        valid: (B, K) bool.
        xy: (B, K, 2) positions, pixels at a short side of 256, from any origin.

    Returns:
        (B, K, R H), radius by radius.
    """
    x, y = xy.unbind(-1)
    squared = (x[:, :, None] - x[:, None]).square() + (y[:, :, None] - y[:, None]).square()
    squared = squared.masked_fill(~valid[:, None], torch.inf)
    means = []
    for radius in POOL_RADII:
        weight = gaussian(squared, radius)
        means.append(weight @ code / (weight.sum(-1, keepdim=True) + 1e-3))
    return torch.cat(means, dim=-1)


@cache
def trained_network() -> SelectionNetwork:
    """The shipped network for `candidate_features`, on the CPU."""
    return load_network(_PATH)


def load_network(path: Path) -> SelectionNetwork:
    """The network of a `.safetensors` file of weights, on the CPU."""
    state = load_file(path)
    width, count = state["encode.0.weight"].shape
    network = SelectionNetwork(count, width)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def select_candidates(
    network: SelectionNetwork, values: Tensor, candidates: Candidates, scale: float
) -> Selection:
    """Select a position for every point and frame; see `select_rows`.

    Args:
        network: on the device of `values`.
        values: (N, T, K, F) features of the candidates.
        candidates: of N points.
        scale: short side of the processing size in units of 256 pixels.
    """
    shape = values.shape[:2]
    valid = candidates.valid.T.repeat(shape[1], axis=0)
    xy = candidates.xy.transpose(1, 2, 0, 3).reshape(*valid.shape, 2)
    rows = select_rows(network, values.flatten(0, 1), valid, xy, scale)
    return Selection(*(value.reshape(*shape, *value.shape[1:]) for value in vars(rows).values()))


@torch.no_grad()
def select_rows(
    network: SelectionNetwork, values: Tensor, valid: np.ndarray, xy: np.ndarray, scale: float
) -> Selection:
    """Select a position in each row, which is a point in a frame.

    It is the mean, by softmax score, of the best candidate and those within AVERAGING_RADIUS of it.

    Args:
        network: on the device of `values`.
        values: (B, K, F) features.
        valid: (B, K) bool.
        xy: (B, K, 2) positions, processing pixels.
        scale: short side of the processing size in units of 256 pixels.

    Returns:
        a selection of B points without a dimension of frames.
    """
    # Only differences matter, and single precision has fewer digits for them far from the origin.
    offset = (xy - xy[:, [FUSED]]) / np.float32(scale)
    inputs = [values, *(torch.from_numpy(value).to(values.device) for value in (valid, offset))]
    batches = zip(*(value.split(ROWS) for value in inputs), strict=True)
    parts = [network(*batch) for batch in batches]
    score, predicted = (torch.cat(part) for part in zip(*parts, strict=True))
    weight = score.softmax(-1).cpu().numpy()
    best = np.take_along_axis(xy, weight.argmax(1)[:, None, None], axis=1)
    weight = weight * (np.linalg.norm(xy - best, axis=-1) < AVERAGING_RADIUS * scale)
    mean = np.einsum("bk,bkd->bd", weight, xy) / weight.sum(1, keepdims=True)
    trust, visibility = predicted[:, :2].sigmoid().T.cpu().numpy()
    sigma = predicted[:, 2].clamp(math.log(0.05), math.log(128.0)).exp().cpu().numpy() * scale
    return Selection(mean.astype(np.float32), trust, visibility, sigma)
