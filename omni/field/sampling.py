"""Batches of correspondences: which frame pairs, which points, and with what evidence.

The stored flows live where the model lives (memory-mapped on a CPU, resident on a GPU); one batch
is a few gathers, with no work per pixel in Python. Everything is drawn on that device too, and
nothing there waits for it. Letters: K pairs, N points per pair.
"""

import logging
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni.config import SamplingConfig
from omni.maths import FLOW_SCALE, unpack_evidence
from omni.store import Store

__all__ = ["Batch", "CorrespondenceSampler", "LongTracks"]

log = logging.getLogger(__name__)

TILE = 16
"""Side in pixels of the tiles over which the running residual is kept."""

BLOCK = 8
"""Held-out correspondences are whole blocks of this side: single pixels have trained neighbours."""

WORST = 20.0
"""Residuals are clamped to this many sigma."""

CANDIDATES = 3
"""Pixels drawn per kept point, so that most of those kept are reliable."""

GENERATOR_BYTES = 16, torch.Generator().get_state().numel()
"""Sizes of a generator's state on a GPU and on a CPU: a fit that goes on where it did not begin
draws other batches."""

PATCH_RADIUS = 1
"""Patches that are compared between frames have 3 x 3 samples, a pixel apart."""


@dataclass
class Batch:
    """K frame pairs with N measured correspondences each; raster pixels, processing resolution.

    Attributes:
        source: (K,) frame index. target: (K,).
        xy: (K, N, 2) source points (pixel centres). target_xy: (K, N, 2) measured targets.
        sigma: (K, N) standard deviation of the measurement.
        visible: (K, N) weight 0/1, reliable and visible in both frames.
        hidden: (K, N) weight 0/1, reliable but occluded in the target.
        color: (K, N, 3) in [0, 1], of the source.
    """

    source: Tensor
    target: Tensor
    xy: Tensor
    target_xy: Tensor
    sigma: Tensor
    visible: Tensor
    hidden: Tensor
    color: Tensor


@dataclass
class LongTracks:
    """Tracks as correspondences between any two frames; raster pixels, processing size.

    Attributes:
        xy: (M, T, 2). sigma: (M, T). seen: (M, T) float 0/1, visible and reliable.
    """

    xy: Tensor
    sigma: Tensor
    seen: Tensor

    def joined(self, other: "LongTracks") -> "LongTracks":
        """Both sets of tracks."""
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return LongTracks(*(torch.cat(pair) for pair in parts))

    def to(self, device: torch.device) -> "LongTracks":
        """The same tracks on a device."""
        return LongTracks(*(value.to(device) for value in vars(self).values()))


class CorrespondenceSampler:
    """Draws training batches and holds a fixed share of correspondences back.

    Args:
        store: finished preprocessing.
        config: how to draw.
        threshold: forward-backward error (pixels) up to which a correspondence is reliable.
        device: where batches live.
        generator: of every draw, on the device.
        tracks: integrated chains or imported tracks, if any.
    """

    def __init__(
        self,
        store: Store,
        config: SamplingConfig,
        threshold: float,
        device: torch.device,
        generator: torch.Generator,
        tracks: LongTracks | None = None,
    ):
        self.tracks = None if tracks is None else tracks.to(device)
        self.config, self.threshold, self.generator = config, threshold, generator
        self.device = device
        self.height, self.width = store.size
        self.halvings = 0
        arrays = store.flow, store.evidence, store.frames
        self.flow, self.evidence, self.frames = (_resident(array, device) for array in arrays)
        self.pairs = torch.from_numpy(store.pairs).to(device)
        self.gaps = (self.pairs[:, 1] - self.pairs[:, 0]).abs()
        self.smallest_gap = int(self.gaps.min())
        gaps, self.gap_index = self.gaps.unique(return_inverse=True)
        self.num_gaps, self.pairs_per_gap = len(gaps), torch.bincount(self.gap_index).double()
        lines = [store.meta("evidence")["sigma"][str(gap)][:2] for gap in self.gaps.tolist()]
        self.sigma_lines = torch.tensor(lines, dtype=torch.float32, device=device).view(-1, 2)
        self.reliable_share = _reliable_share(store, threshold).to(device)
        tiles = (store.num_frames, -(-self.height // TILE), -(-self.width // TILE))
        self.residual = torch.ones(tiles, device=device)
        self.last = torch.tensor([self.width - 1.0, self.height - 1.0], device=device)

    @property
    def batch_pairs(self) -> int:
        """Pairs per batch: the setting, halved whenever the memory was too small for it."""
        return max(1, self.config.pairs >> self.halvings)

    def draw(self, gap_limit: int) -> Batch:
        """A training batch from pairs at most `gap_limit` frames apart (at least adjacent ones).

        A share of the pairs comes from long tracks, where there are any, at any distance in time.
        """
        pairs, share = self.batch_pairs, self.config.tracks
        from_tracks = round(pairs * share) if self.tracks is not None and pairs > 1 else 0
        flows = self._draw_flows(pairs - from_tracks, gap_limit)
        if not from_tracks:
            return flows
        return _joined(flows, self._draw_tracks(from_tracks))

    def _draw_flows(self, pairs: int, gap_limit: int) -> Batch:
        config = self.config
        k = torch.multinomial(
            self._pair_weights(gap_limit), pairs, replacement=True, generator=self.generator
        )
        x, y = self._points(self.pairs[k, 0], CANDIDATES * config.points)
        visible, hidden = self._weights(k, x, y, held_out=False)
        best = (visible + hidden > 0).float().argsort(dim=1, descending=True, stable=True)
        keep = best[:, : config.points]
        x, y = x.gather(1, keep), y.gather(1, keep)
        return self._batch(k, x, y, visible.gather(1, keep), hidden.gather(1, keep))

    def _draw_tracks(self, pairs: int) -> Batch:
        """Random pairs of frames, and tracks visible in both."""
        tracks, points = self.tracks, self.config.points
        assert tracks is not None
        frames = tracks.seen.shape[1]
        ends = torch.randint(frames, (2, pairs), generator=self.generator, device=self.device)
        # Never the same frame twice.
        ends[1] = (ends[0] + 1 + ends[1] % (frames - 1)) % frames
        both = tracks.seen[:, ends[0]] * tracks.seen[:, ends[1]]
        chance = both.T + 1e-9
        index = torch.multinomial(chance, points, replacement=True, generator=self.generator)
        source, target = ends
        xy, target_xy = (tracks.xy[index, end[:, None]] for end in ends)
        sigma = torch.hypot(*(tracks.sigma[index, end[:, None]] for end in ends))
        pixel = xy.long()
        x, y = pixel[..., 0].clamp(0, self.width - 1), pixel[..., 1].clamp(0, self.height - 1)
        color = self._gather(self.frames, source[:, None], y, x).float() / 255
        visible = both.T.gather(1, index)
        hidden = torch.zeros_like(visible)
        return Batch(source, target, xy, target_xy, sigma, visible, hidden, color)

    def held_out(self, count: int, seed: int = 0) -> Batch:
        """About `count` held-out correspondences, visible and hidden; the same for a given seed."""
        generator = torch.Generator().manual_seed(seed)
        weights = ((self.reliable_share > 0) / self.pairs_per_gap[self.gap_index]).cpu()
        points = 64
        rows = max(1, count // points)
        if weights.sum() == 0:
            weights = torch.ones(len(self.pairs), dtype=torch.double)
        k = torch.multinomial(weights, rows, replacement=True, generator=generator)
        share = self.config.held_out
        over = 4 * int(points / max(share, 1e-3)) if share else points
        x = torch.randint(self.width, (rows, over), generator=generator).to(self.device)
        y = torch.randint(self.height, (rows, over), generator=generator).to(self.device)
        k = k.to(self.device)
        visible, hidden = self._weights(k, x, y, held_out=True)
        keep = (visible + hidden).argsort(dim=1, descending=True, stable=True)[:, :points]
        x, y, visible, hidden = (values.gather(1, keep) for values in (x, y, visible, hidden))
        return self._batch(k, x, y, visible, hidden)

    def patches(self, times: Tensor, xy: Tensor) -> Tensor:
        """Image patches around points: bilinear colours `(K, N, 9, 3)` in [0, 1].

        Differentiable in `xy` within the frame; beyond it the border is repeated.

        Args:
            times: `(K,)` frame indices.
            xy: `(K, N, 2)` raster pixels, processing resolution.
        """
        ticks = torch.arange(-PATCH_RADIUS, PATCH_RADIUS + 1.0, device=xy.device)
        offsets = torch.cartesian_prod(ticks, ticks)
        last = self.last.to(xy.dtype)
        position = (xy[:, :, None] + offsets - 0.5).clamp(min=torch.zeros_like(last), max=last)
        # Where a mapping has diverged the position is NaN; its index must be valid all the same.
        corner = position.detach().nan_to_num().floor()
        fx, fy = (position - corner).unsqueeze(-1).unbind(-2)
        x, y = corner.long().unbind(-1)
        right, below = (x + 1).clamp(max=self.width - 1), (y + 1).clamp(max=self.height - 1)
        times = times[:, None, None]

        def row(y: Tensor) -> Tensor:
            start, end = (
                self._gather(self.frames, times, y, column).float() for column in (x, right)
            )
            return torch.lerp(start, end, fx)

        return torch.lerp(row(y), row(below), fy) / 255

    def report(self, batch: Batch, residual: Tensor) -> None:
        """Note the residuals `(K, N)` (in sigma) of a drawn batch for hard mining."""
        column, row = (batch.xy / TILE).long().unbind(-1)
        row = row.clamp(0, self.residual.shape[1] - 1)
        column = column.clamp(0, self.residual.shape[2] - 1)
        frame = batch.source[:, None].expand_as(row)
        index = (frame * self.residual.shape[1] + row) * self.residual.shape[2] + column
        weight = batch.visible.flatten()
        # Not a number where the update was left out: such a point could not be drawn again.
        value = residual.detach().nan_to_num(nan=WORST).clamp(max=WORST).flatten()
        flat, index = self.residual.view(-1), index.flatten()
        count = torch.zeros_like(flat).index_add_(0, index, weight)
        mean = torch.zeros_like(flat).index_add_(0, index, weight * value) / count.clamp(min=1)
        flat.copy_(torch.where(count > 0, 0.9 * flat + 0.1 * mean, flat))

    def state_dict(self) -> dict[str, Tensor]:
        """State of hard mining and of the generator, for a resumed run."""
        return {"residual": self.residual, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue as `state_dict` was taken.

        Raises:
            ValueError, RuntimeError: no such state.
        """
        residual = state["residual"]
        if residual.shape != self.residual.shape or residual.dtype != self.residual.dtype:
            raise ValueError("residuals of another video")
        # Both comparisons are false for NaN. No point could be drawn from a frame of zeros alone.
        inside = (residual >= 0) & (residual <= WORST)
        if not (inside.all() and (residual.flatten(1).sum(1) > 0).all()):
            raise ValueError("residuals out of range")
        self.residual = residual.to(self.device).clone(memory_format=torch.contiguous_format)
        generator = state["generator"]
        if generator.shape != self.generator.get_state().shape:
            if generator.dtype != torch.uint8 or generator.numel() not in GENERATOR_BYTES:
                raise ValueError("no state of a generator")
            self.generator.manual_seed(zlib.crc32(bytes(generator.tolist())))
        else:
            self.generator.set_state(generator)

    def _pair_weights(self, gap_limit: int) -> Tensor:
        """(K_all,) probability weights of every stored pair."""
        config = self.config
        allowed = (self.gaps <= max(gap_limit, self.smallest_gap)).double()
        weights = allowed * (self.reliable_share > 0)
        weights = torch.where(weights.sum() == 0, allowed, weights)
        if config.balance_gaps:
            per_gap = allowed.new_zeros(self.num_gaps).index_add_(0, self.gap_index, weights)
            weights = weights / per_gap[self.gap_index].clamp(min=1)
        else:
            weights = weights * self.reliable_share
        mined = self.residual.mean((1, 2))[self.pairs[:, 0]].double()
        mined = weights * mined / mined.mean()
        weights = _normalized(weights) * (1 - config.mining) + _normalized(mined) * config.mining
        adjacent = (self.gaps == 1).double()
        share = config.adjacent_share if self.smallest_gap == 1 else 0.0
        return (1 - share) * weights + share * _normalized(adjacent)

    def _points(self, frames: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Integer pixel columns and rows `(K, count)`, a share of them where residuals are high."""
        shape = (len(frames), count)
        generator, device = self.generator, self.device
        x = torch.randint(self.width, shape, generator=generator, device=device)
        y = torch.randint(self.height, shape, generator=generator, device=device)
        mined = round(count * self.config.mining)
        if mined:
            tiles = self.residual[frames].flatten(1)
            tile = torch.multinomial(tiles, mined, replacement=True, generator=generator)
            columns = self.residual.shape[2]
            x0, y0 = tile % columns * TILE, tile // columns * TILE
            spot = torch.rand((2, len(frames), mined), generator=generator, device=device)
            # Tiles at the right and lower border may be narrower.
            x[:, :mined] = x0 + (spot[0] * (self.width - x0).clamp(max=TILE)).long()
            y[:, :mined] = y0 + (spot[1] * (self.height - y0).clamp(max=TILE)).long()
            order = torch.randperm(count, generator=generator, device=device)
            x, y = x[:, order], y[:, order]
        return x, y

    def _weights(self, k: Tensor, x: Tensor, y: Tensor, held_out: bool) -> tuple[Tensor, Tensor]:
        """Visible and hidden weights `(K, N)` of candidate pixels, from one side of the split."""
        evidence = unpack_evidence(self._gather(self.evidence, k[:, None], y, x))
        side = _held_out(k[:, None], x, y, self.config.held_out) == held_out
        visible = side & evidence.valid & (evidence.error <= self.threshold)
        hidden = side & evidence.valid & evidence.occluded
        return visible.float(), (hidden & ~visible).float()

    def _gather(self, array: Tensor, *index: Tensor) -> Tensor:
        """Entries of a stored array, wherever it lives, on the model's device."""
        return array[tuple(part.to(array.device) for part in index)].to(self.device)

    def _batch(self, k: Tensor, x: Tensor, y: Tensor, visible: Tensor, hidden: Tensor) -> Batch:
        source, target = self.pairs[k].unbind(-1)
        flow = self._gather(self.flow, k[:, None], y, x).float() / FLOW_SCALE
        error = unpack_evidence(self._gather(self.evidence, k[:, None], y, x)).error
        xy = torch.stack([x, y], dim=-1).float() + 0.5
        floor, slope = self.sigma_lines[k].unsqueeze(1).unbind(-1)
        return Batch(
            source=source,
            target=target,
            xy=xy,
            target_xy=xy + flow,
            sigma=floor + slope * error.float(),
            visible=visible,
            hidden=hidden,
            color=self._gather(self.frames, source[:, None], y, x).float() / 255,
        )


def _resident(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of the store on `device`; memory-mapped on the CPU where it does not fit."""
    mapped = torch.from_numpy(array)
    try:
        return mapped.to(device)
    except torch.OutOfMemoryError:
        size = array.nbytes / 1e9
        log.warning("%s has no room for %.1f GB of the store: it stays on the disk", device, size)
        return mapped


def _joined(first: Batch, second: Batch) -> Batch:
    """Both batches' pairs, one after the other."""
    parts = zip(vars(first).values(), vars(second).values(), strict=True)
    return Batch(*(torch.cat(pair) for pair in parts))


def _held_out(k: Tensor, x: Tensor, y: Tensor, share: float) -> Tensor:
    """Fixed pseudo-random choice of blocks of pixels of each pair."""
    mixed = (k * 73856093) ^ ((y // BLOCK) * 19349663) ^ ((x // BLOCK) * 83492791)
    mixed = (mixed * 2654435761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    return mixed < share * 2**32


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp(min=1e-12)


def _reliable_share(store: Store, threshold: float) -> Tensor:
    """(K,) share of reliable pixels of each pair, from every 4th row and column."""
    shares = np.zeros(len(store.pairs))
    for k, code in enumerate(store.evidence):
        evidence = unpack_evidence(code[::4, ::4])
        shares[k] = (evidence.valid & (evidence.error <= threshold)).mean()
    return torch.from_numpy(shares)
