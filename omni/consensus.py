"""Whom to believe: a small network weighs all witnesses of a point, frame by frame.

It sees, for each witness, how its chain fared, how far the colours it leads to are from those of
the query, how many others agree with it, and how far it is from the settled path and the field.
Witnesses who name nearly the same place hear each other, so that a place is weighed by all that is
known of those who name it. The network answers with weights, and says of the result how likely the
point is visible, visible and within 6 px, and how large the error is. Each point and frame is
judged alone; `fusion.curve` joins them.

Its weights are data, `omni/consensus.safetensors`, trained on generated clips by
`scripts/train_consensus.py`.

Letters: W witnesses, N points, T frames, F features, H width, B rows (points and frames),
C circles.
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

from omni.appearance import contrast, differences
from omni.camera import REFERENCE_SIDE
from omni.confidence import frames_away
from omni.integration import GUESSED, LOOSE, STRICT
from omni.links import Links, sample_flow
from omni.witnesses import FIELD, NAMED, PATH, Witnesses

__all__ = [
    "THRESHOLD",
    "Consensus",
    "Verdict",
    "believe",
    "circles",
    "features",
    "joined",
    "trained",
]

NEARBY = 4.0
"""Pixels, at a short side of 256, within which witnesses are averaged with the best one: the mean
of two different stories is a third one that nobody told."""

CIRCLES = (1.0, 3.0, 10.0)
"""Pixels, at a short side of 256, within which witnesses hear each other."""

THRESHOLD = 0.4
"""Least P(visible and within 6 px) of a point called visible: J / (1 + J) is best for AJ at a
Jaccard index J of 0.67."""

ROWS = 2**10
"""Points and frames that go through the network at once."""

FAR = 20.0
_REACH, _COLOR_REACH = 10.0, 12.0
_VOTES = (1.0, 0.3, 0.05)
_FIELD_VOTE = 0.3
_KERNELS = (1.0, 3.0)
_STRIDES = (1, 4)
_PATH = Path(__file__).with_name("consensus.safetensors")


@dataclass
class Verdict:
    """What was believed of N points in T frames.

    xy: (N, T, 2) processing pixels. trust, visibility: (N, T) probabilities of being visible and
    within 6 px, and of being visible. sigma: (N, T) processing pixels.
    """

    xy: np.ndarray
    trust: np.ndarray
    visibility: np.ndarray
    sigma: np.ndarray


class Consensus(nn.Module):
    """Scores of witnesses, each encoded alike, in view of the mean, the extremes and the path.

    Args:
        count: F.
        width: H.
    """

    def __init__(self, count: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("spread", torch.ones(count))
        self.encode = nn.Sequential(
            nn.Linear(count, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.keep, self.hear = nn.Linear(width, width), nn.Linear(len(CIRCLES) * width, width)
        self.own, self.common = nn.Linear(width, width), nn.Linear(3 * width, width)
        self.score = nn.Linear(width, 1)
        self.judge = nn.Sequential(nn.Linear(4 * width, width), nn.SiLU(), nn.Linear(width, 3))

    def forward(self, values: Tensor, valid: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh witnesses.

        Args:
            values: (B, W, F) features.
            valid: (B, W) bool; the path is always valid.
            xy: (B, W, 2) the places they name, pixels at a short side of 256, from any origin.

        Returns:
            (B, W) scores, -inf where not valid, and (B, 3): logits of trust and of visibility, and
            log sigma in pixels at a short side of 256.
        """
        code = self.encode((values - self.mean) / self.spread)
        code = code + F.silu(self.keep(code) + self.hear(circles(code, valid, xy)))
        known = valid[..., None]
        mean = (code * known).sum(1) / known.sum(1)
        most = code.masked_fill(~known, -torch.inf).amax(1)
        common = torch.cat([mean, most, code[:, PATH]], dim=-1)
        score = self.score(F.silu(self.own(code) + self.common(common)[:, None]))[..., 0]
        score = score.masked_fill(~valid, -torch.inf)
        believed = (score.softmax(-1)[..., None] * code).sum(1)
        return score, self.judge(torch.cat([believed, common], dim=-1))


def circles(code: Tensor, valid: Tensor, xy: Tensor) -> Tensor:
    """Mean codes (B, W, C H) of the valid witnesses in each of the C circles around each.

    Circles are Gaussian windows. See `Consensus.forward` for what is given.
    """
    squared = sum((one[:, :, None] - one[:, None]).square() for one in xy.unbind(-1))
    squared = squared.masked_fill(~valid[:, None], torch.inf)
    means = []
    for reach in CIRCLES:
        weight = torch.exp(squared * (-0.5 / reach**2))
        means.append(weight @ code / (weight.sum(-1, keepdim=True) + 1e-3))
    return torch.cat(means, dim=-1)


@cache
def trained() -> Consensus:
    """The shipped network, on the CPU."""
    state = load_file(_PATH)
    width, count = state["encode.0.weight"].shape
    network = Consensus(count, width)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def features(
    said: Witnesses,
    seen: np.ndarray,
    links: Links,
    video: np.ndarray,
    frames: np.ndarray,
    device: torch.device,
) -> Tensor:
    """Features `(N, T, W, F)` float32 of every witness, free of scale.

    Args:
        said: what they say.
        seen: (N, T) visibility by the field.
        links: the flows.
        video: (T, h, w, 3) uint8.
        frames: (N,) query frames.
        device: where to compute.
    """
    shape, scale = said.level.shape, min(links.size) / REFERENCE_SIDE
    points = np.arange(len(frames))
    strict, loose, guessed = (said.level == level for level in (STRICT, LOOSE, GUESSED))
    known = strict | loose
    close = np.stack([frames_away(one) for one in strict])
    away = np.abs(np.arange(shape[2]) - frames[:, None])
    contrasts = contrast(video, said.xy[PATH, points, frames], frames, said.offset)
    sure = strict[PATH].copy()
    sure[points, frames] = True
    colors = differences(video, said.xy, frames, sure)
    slips, parted = _slips(links, said.xy), _parted(said.xy, frames)

    def put(array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float32, device=device)

    def log(array: np.ndarray, known: np.ndarray | bool = True) -> Tensor:
        return torch.log(put(np.where(known, np.minimum(array / scale, FAR), FAR)) + 0.1)

    xy, strict, loose, guessed = put(said.xy) / scale, put(strict), put(loose), put(guessed)
    valid, reach = put(said.valid), put(np.linalg.norm(said.offset, axis=-1)) / scale
    contrasts = put(contrasts)
    voice = valid * torch.exp(-contrasts[0] / _COLOR_REACH - reach / _REACH)
    votes = voice[..., None] * (_VOTES[0] * strict + _VOTES[1] * loose + _VOTES[2] * guessed)
    votes[FIELD] = _FIELD_VOTE
    # Direct and adjacent flow repeat what the others have already said.
    voice[FIELD + 2 : len(NAMED)] = votes[FIELD + 2 : len(NAMED)] = 0
    watched = strict.clone()
    watched[FIELD] = 1
    near, common, apart = _agreement(xy, votes, voice, watched)
    colors = torch.log(put(colors) + 1)
    typical = (watched * colors).sum(-1) / (watched.sum(-1) + 1)
    from_field = torch.log((xy - xy[FIELD]).norm(dim=-1).clamp(max=50) + 0.3)
    heard = votes.sum(0) / (voice.sum(0)[:, None] + 0.1)
    names = torch.eye(len(NAMED), device=device)
    names = F.pad(names, (0, 0, 0, shape[0] - len(NAMED))).T[:, :, None, None]

    def wide(value: Tensor) -> Tensor:
        return value.expand(shape)

    def each(value: Tensor) -> Tensor:
        return wide(value[..., None])

    values = [
        strict,
        loose,
        guessed,
        log(said.sigma, known),
        log(said.error, known),
        put(np.minimum(said.agree, 6) / 6),
        torch.log1p(put(np.minimum(close, 30))),
        put(said.covered),
        torch.log(put(np.clip(said.stretch, 1, 8))),
        each(strict.mean(-1)),
        *colors,
        *map(each, typical),
        *near,
        each(common),
        from_field,
        each(from_field.mean(-1)),
        torch.log((xy - xy[PATH]).norm(dim=-1).clamp(max=50) + 0.3),
        each(torch.log(apart + 0.3)),
        *torch.log(put(slips).clamp(max=FAR * scale) / scale + 0.1),
        *map(each, torch.log(put(parted).clamp(max=FAR * scale) / scale + 0.1)),
        each(torch.log1p(reach)),
        *map(each, torch.log(contrasts + 2)),
        *map(wide, names),
        wide(torch.log1p(put(away))),
        wide(put(seen)),
        wide(heard),
        wide(near[0].amax(0)),
    ]
    return torch.stack(values).permute(2, 3, 1, 0)


def _slips(links: Links, xy: np.ndarray) -> np.ndarray:
    """Pixels by which witnesses leave the flow at the place where they say the point is.

    Who goes astray moves otherwise than the surface that he has got onto.

    Returns:
        (4, W, N, T): towards frames one later, one earlier, four later, four earlier; 0 where
        there is no flow.
    """
    times = xy.shape[2]
    result = np.zeros((2 * len(_STRIDES), *xy.shape[:3]), np.float32)
    for row, step in enumerate(sign * gap for gap in _STRIDES for sign in (1, -1)):
        for t in range(max(0, -step), min(times, times - step)):
            if links.stored(t, t + step):
                start = xy[:, :, t].reshape(-1, 2)
                flow = sample_flow(links.fields(t, t + step)[0], start)
                off = start + flow - xy[:, :, t + step].reshape(-1, 2)
                result[row, :, :, t] = np.linalg.norm(off, axis=-1).reshape(xy.shape[:2])
                links.release()
    return result


def _parted(xy: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Pixels `(2, W, N)` between witnesses and the path, one and four frames before or after the
    query, whichever is more.
    """
    apart = np.linalg.norm(xy - xy[PATH], axis=-1)
    points, last = np.arange(len(frames)), xy.shape[2] - 1
    sides = [
        [apart[:, points, np.clip(frames + sign * gap, 0, last)] for sign in (1, -1)]
        for gap in _STRIDES
    ]
    return np.stack([np.maximum(*pair) for pair in sides])


def _agreement(xy: Tensor, votes: Tensor, voice: Tensor, watched: Tensor):
    """How far witnesses agree with each other.

    Args:
        xy: (W, N, T, 2) pixels at a short side of 256.
        votes: (W, N, T) weight of each at each time.
        voice: (W, N) weight of each at all times.
        watched: (W, N, T) 1 where a path is compared with others.

    Returns:
        (2, W, N, T) share of the votes within about 1 and 3 px, (W, N) share of the voices along
        the whole path, and (W, N) mean distance from the settled path.
    """
    all_votes, all_voices = votes.sum(0), voice.sum(0)
    near, common, from_path = [], [], None
    axes = [one.contiguous() for one in xy.unbind(-1)]
    for w in range(len(xy)):
        squared = sum((one - one[w]).square() for one in axes)
        distance = squared.sqrt()
        others = all_votes - votes[w] + 0.1
        kernels = [torch.exp(squared * (-0.5 / width**2)) for width in _KERNELS]
        near.append(torch.stack([((k * votes).sum(0) - votes[w]) / others for k in kernels]))
        both = watched * watched[w]
        apart = (distance.clamp(max=FAR) * both).sum(-1) / (both.sum(-1) + 1)
        if w == PATH:
            from_path = apart
        alike = torch.exp(-apart / 1.5)
        common.append(
            ((alike * voice).sum(0) - alike[w] * voice[w]) / (all_voices - voice[w] + 0.3)
        )
    return torch.stack(near, dim=1), torch.stack(common), from_path


@torch.no_grad()
def believe(network: Consensus, values: Tensor, said: Witnesses, scale: float) -> Verdict:
    """The verdict on `features` of what was said."""
    count, times = values.shape[:2]
    valid = torch.from_numpy(said.valid.T).to(values.device)[:, None].expand(-1, times, -1)
    # Differences count, and far from the origin single precision has fewer digits for them.
    place = torch.from_numpy((said.xy - said.xy[PATH]) / np.float32(scale)).to(values.device)
    inputs = values, valid, place.permute(1, 2, 0, 3)
    points = zip(*(value.split(max(1, ROWS // times)) for value in inputs), strict=True)
    parts = [network(*(value.flatten(0, 1) for value in some)) for some in points]
    score, judged = (
        torch.cat(part).unflatten(0, (count, times)) for part in zip(*parts, strict=True)
    )
    weight = score.softmax(-1).permute(2, 0, 1).cpu().numpy()
    best = np.take_along_axis(said.xy, weight.argmax(0)[None, ..., None], axis=0)
    weight = weight * (np.linalg.norm(said.xy - best, axis=-1) < NEARBY * scale)
    xy = (weight[..., None] * said.xy).sum(0) / weight.sum(0)[..., None]
    trust, visibility = judged[..., :2].sigmoid().permute(2, 0, 1).cpu().numpy()
    sigma = judged[..., 2].clamp(math.log(0.05), math.log(128.0)).exp().cpu().numpy() * scale
    return Verdict(xy.astype(np.float32), trust, visibility, sigma)


def joined(parts: list[Verdict]) -> Verdict:
    """One verdict on the points of all parts."""
    return Verdict(
        *(np.concatenate(each) for each in zip(*(vars(p).values() for p in parts), strict=True))
    )
