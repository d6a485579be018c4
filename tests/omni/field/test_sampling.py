from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from omni.config import SamplingConfig
from omni.field.sampling import Batch, CorrespondenceSampler, LongTracks
from omni.maths.coords import sample_image

PLAIN = SamplingConfig(pairs=64, points=16, mining=0.0, held_out=0.0)


def sampler(store, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    config = replace(PLAIN, **changes)
    return CorrespondenceSampler(store, config, 1.5, torch.device("cpu"), generator)


def blocks(batch, weight):
    """The 8x8 pixel blocks of a batch's weighted correspondences, by pair."""
    pair = torch.stack([batch.source, batch.target], -1)[:, None].expand(*batch.xy.shape)
    key = torch.cat([pair, (batch.xy / 8).long()], dim=-1)[weight > 0]
    return set(map(tuple, key.tolist()))


def same(a: Batch, b: Batch):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))


def shares_of_gaps(batch):
    gap, count = (batch.target - batch.source).abs().unique(return_counts=True)
    return {int(g): float(c) / len(batch.source) for g, c in zip(gap, count, strict=True)}


def test_held_out_blocks_never_appear_in_training_draws(small_store):
    draws = sampler(small_store, held_out=0.3, mining=0.5)
    kept_back = draws.held_out(30000)
    held = blocks(kept_back, kept_back.visible)
    trained = set()
    for _ in range(60):
        batch = draws.draw(32)
        trained |= blocks(batch, batch.visible + batch.hidden)
    assert not held & trained
    assert len(trained) > 150, "nearly every other block is trained on"
    assert 0.2 < len(held) / (len(held) + len(trained)) < 0.4


def test_without_a_held_out_share_nothing_is_held_out(small_store):
    assert sampler(small_store, held_out=0.0).held_out(500).visible.sum() == 0


def test_held_out_correspondences_are_the_same_for_a_seed_and_all_reliable(small_store):
    first, again = (sampler(small_store, seed, held_out=0.3).held_out(2000) for seed in (0, 9))
    assert same(first, again)
    assert (first.visible + first.hidden).mean() > 0.95
    assert first.visible.mean() > 0.8 and first.hidden.any()


def test_a_batch_measures_the_true_motion_at_pixel_centres(small_store, scene):
    batch = sampler(small_store).draw(32)
    assert batch.xy.shape == (64, 16, 2) and (batch.xy % 1 == 0.5).all()
    weighted = batch.visible + batch.hidden
    assert set(weighted.unique().tolist()) <= {0.0, 1.0} and weighted.mean() > 0.99
    for k in range(64):
        t, xy = int(batch.source[k]), batch.xy[k].double().numpy()
        expected = scene.track(xy, t, int(batch.target[k]))
        np.testing.assert_allclose(batch.target_xy[k], expected, atol=1 / 60)
        column, row = batch.xy[k].long().unbind(-1)
        assert torch.equal(
            batch.color[k], torch.from_numpy(small_store.frames[t])[row, column] / 255
        )
    assert batch.sigma[batch.visible > 0].min() >= 0.25


def test_patches_are_the_stored_pixels_and_bilinear_between_them(small_store):
    draws = sampler(small_store)
    height, width = small_store.size
    times = torch.tensor([1, 4])
    xy = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    xy = xy * torch.tensor([width, height])  # some beyond the frame
    xy[:, 0] = torch.tensor([7.5, 4.5])
    patches = draws.patches(times, xy)
    assert patches.shape == (2, 40, 9, 3)
    for k, t in enumerate(times.tolist()):
        frame = torch.from_numpy(small_store.frames[t]).float() / 255
        centers = {tuple(p.tolist()) for p in frame[3:6, 6:9].reshape(-1, 3)}
        assert {tuple(p.tolist()) for p in patches[k, 0]} == centers
        torch.testing.assert_close(patches[k, :, 4], sample_image(frame, xy[k]))


def test_gradients_of_patches_equal_finite_differences_and_nan_is_kept(small_store):
    draws = sampler(small_store)
    xy = torch.tensor([[[10.3, 8.6], [20.2, 11.7], [-50.0, 9.0]]], requires_grad=True)
    times, step = torch.tensor([2]), torch.tensor([1e-2, 0.0])
    draws.patches(times, xy)[..., 0].sum().backward()
    with torch.no_grad():
        ahead, behind = (draws.patches(times, xy + sign * step)[..., 0] for sign in (1, -1))
    expected = (ahead - behind).sum(-1)[0] / 2e-2
    torch.testing.assert_close(xy.grad[0, :, 0], expected, atol=1e-3, rtol=1e-3)
    assert xy.grad[0, 2, 0] == 0 and expected[:2].abs().min() > 1e-2
    assert draws.patches(times, torch.full((1, 1, 2), torch.nan)).isnan().all()


def test_hidden_points_are_background_that_the_square_covers(small_store, scene):
    """Nearly all: along the square's edge the reverse flow is a mixture of both layers."""
    draws, right = sampler(small_store), []
    for _ in range(10):
        batch = draws.draw(32)
        for k, n in batch.hidden.nonzero().tolist():
            source, target = (batch.xy[k, n].numpy(), batch.target_xy[k, n].numpy())
            i, j = int(batch.source[k]), int(batch.target[k])
            right.append(not scene.on_square(source, i) and scene.on_square(target, j))
    assert len(right) > 50 and np.mean(right) > 0.9


def test_balanced_draws_take_every_gap_equally_often(small_store):
    shares = shares_of_gaps(sampler(small_store, pairs=9000, points=1).draw(32))
    assert shares == pytest.approx({1: 1 / 3, 2: 1 / 3, 4: 1 / 3}, abs=0.02)


def test_unbalanced_draws_follow_the_number_of_reliable_pixels(small_store):
    draws = sampler(small_store, pairs=9000, points=1, balance_gaps=False)
    weight = {gap: float(draws.reliable_share[draws.gaps == gap].sum()) for gap in (1, 2, 4)}
    expected = {gap: w / sum(weight.values()) for gap, w in weight.items()}
    assert expected[1] > 2 * expected[4]
    assert shares_of_gaps(draws.draw(32)) == pytest.approx(expected, abs=0.02)


def test_adjacent_share_comes_on_top_of_the_schedule(small_store):
    shares = shares_of_gaps(sampler(small_store, pairs=9000, points=1, adjacent_share=0.5).draw(32))
    assert shares == pytest.approx({1: 2 / 3, 2: 1 / 6, 4: 1 / 6}, abs=0.02)


@pytest.mark.parametrize(
    "limit, gaps", [(0, {1}), (1, {1}), (2, {1, 2}), (3, {1, 2}), (4, {1, 2, 4})]
)
def test_no_pair_is_longer_than_the_gap_limit(small_store, limit, gaps):
    assert set(shares_of_gaps(sampler(small_store, pairs=500, points=1).draw(limit))) == gaps


def in_tile(xy):
    """Points in the top-right tile."""
    return (xy[..., 0] >= 16) & (xy[..., 1] < 16)


def share_in_tile(draws, frame):
    """Share of a frame's drawn points that lie in that tile."""
    batch = draws.draw(32)
    return float(in_tile(batch.xy[batch.source == frame]).float().mean())


def report_large_residuals(draws, frame):
    for _ in range(30):
        batch = draws.draw(32)
        there = (batch.source == frame)[:, None] & in_tile(batch.xy)
        draws.report(batch, torch.where(there, 20.0, 0.1))


def test_mining_draws_more_where_the_residual_is_large(small_store):
    draws = sampler(small_store, pairs=2000, mining=0.5)
    before = share_in_tile(draws, 2)
    report_large_residuals(draws, 2)
    batch = draws.draw(32)
    assert share_in_tile(draws, 2) > 1.5 * before
    assert (batch.source == 2).float().mean() > 1.5 / 6, "its frame is drawn more often too"


def test_without_mining_residuals_change_nothing(small_store):
    draws = sampler(small_store, pairs=2000, mining=0.0)
    before = share_in_tile(draws, 2)
    report_large_residuals(draws, 2)
    assert share_in_tile(draws, 2) == pytest.approx(before, abs=0.03)


def test_one_huge_or_unweighted_residual_does_not_take_over(small_store):
    draws = sampler(small_store, pairs=500, mining=0.5)
    batch = draws.draw(32)
    draws.report(batch, torch.full(batch.visible.shape, float("inf")))
    assert draws.residual.max() <= 3
    nothing = replace(batch, visible=torch.zeros_like(batch.visible))
    before = draws.residual.clone()
    draws.report(nothing, torch.full(batch.visible.shape, 9.0))
    assert torch.equal(draws.residual, before)


def test_the_same_generator_state_gives_the_same_batch(small_store):
    first, again, other = (sampler(small_store, seed, mining=0.5) for seed in (4, 4, 5))
    for _ in range(3):
        batch = first.draw(32)
        assert same(batch, again.draw(32)) and not same(batch, other.draw(32))


def test_state_dict_continues_mining_and_draws(small_store):
    first, second = (sampler(small_store, seed, mining=0.5) for seed in (0, 1))
    report_large_residuals(first, 3)
    state = first.state_dict()
    second.load_state_dict(state)
    assert same(first.draw(32), second.draw(32))
    report_large_residuals(second, 0)
    assert not torch.equal(first.residual, second.residual), "the state is a copy"


def test_a_store_without_one_reliable_pixel_still_gives_batches(write_store, scene, tmp_path):
    from omni.maths.quantisation import Evidence

    pairs = [(0, 1), (1, 0)]
    no = np.zeros(scene.size, bool)
    nothing = {pair: Evidence(np.full(scene.size, 9.0), no, no) for pair in pairs}
    frames = np.stack([scene.frame(t) for t in range(2)])
    flows = {pair: scene.flow(*pair) for pair in pairs}
    draws = sampler(write_store(tmp_path, frames, pairs, flows, nothing), held_out=0.05)
    assert draws.draw(32).visible.sum() == 0 and draws.held_out(100).visible.sum() == 0


def true_tracks(scene, count=300, seed=0):
    """Exact tracks of points of both layers, a third of their positions not visible, NaN-free."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform([8, 6], [24, 18], (count, 2))
    positions = np.stack([scene.track(xy, 0, t) for t in range(scene.num_frames)], 1)
    seen = rng.uniform(size=positions.shape[:2]) < 2 / 3
    masked = np.where(seen[..., None], positions, -1000)
    sigma = rng.uniform(0.3, 2, seen.shape)
    return LongTracks(*(torch.from_numpy(v.astype(np.float32)) for v in (masked, sigma, seen)))


def with_tracks(store, long, **changes):
    generator, config = torch.Generator().manual_seed(0), replace(PLAIN, **changes)
    return CorrespondenceSampler(store, config, 1.5, torch.device("cpu"), generator, long)


def test_long_tracks_are_drawn_where_both_ends_are_seen_at_any_distance_in_time(small_store, scene):
    tracks = true_tracks(scene)
    batch = with_tracks(small_store, tracks, tracks=0.5).draw(1)
    assert batch.xy.shape == (64, 16, 2)
    gaps = (batch.target - batch.source).abs()
    assert set(gaps[:32].tolist()) == {1}, "flows keep to the gap limit"
    assert set(gaps[32:].tolist()) >= {2, 3, 4, 5}
    for k in range(32, 64):
        source, target = int(batch.source[k]), int(batch.target[k])
        away = (batch.xy[k][:, None] - tracks.xy[:, source]).norm(dim=-1)
        which = away.argmin(1)
        assert away.min(1).values.max() == 0, "each is one of the tracks"
        assert torch.equal(batch.target_xy[k], tracks.xy[which, target])
        assert tracks.seen[which, source].all() and tracks.seen[which, target].all()
        assert (batch.visible[k] == float(source != target)).all() and not batch.hidden[k].any()
        sigma = torch.hypot(tracks.sigma[which, source], tracks.sigma[which, target])
        assert torch.allclose(batch.sigma[k], sigma)
        row, column = batch.xy[k].long().flip(-1).clamp(min=0).unbind(-1)
        color = torch.from_numpy(small_store.frames[source])[
            row.clamp(max=23), column.clamp(max=31)
        ]
        assert torch.equal(batch.color[k], color / 255)


def test_a_track_seen_in_one_frame_alone_never_counts(small_store, scene):
    tracks = true_tracks(scene, 40)
    tracks.seen.zero_()
    tracks.seen[:, 2] = 1
    batch = with_tracks(small_store, tracks, tracks=0.5).draw(32)
    assert batch.visible[32:].sum() == 0


def test_the_share_of_tracks_is_as_configured_and_none_without_tracks(small_store, scene):
    tracks = true_tracks(scene)
    for share, flows in ((0.0, 64), (0.25, 48), (0.9, 6)):
        batch = with_tracks(small_store, tracks, tracks=share).draw(32)
        centred = (batch.xy % 1 == 0.5).all(-1).all(-1)
        assert int(centred.sum()) == flows and len(batch.source) == 64
    plain = with_tracks(small_store, None, tracks=0.5).draw(32)
    assert len(plain.source) == 64 and (plain.xy % 1 == 0.5).all()


def test_residuals_of_tracks_are_mined_like_those_of_flows(small_store, scene):
    """Also where a track has left the frame."""
    tracks = true_tracks(scene)
    tracks.xy += 20
    draws = with_tracks(small_store, tracks, tracks=0.5, mining=0.5)
    batch = draws.draw(32)
    draws.report(batch, torch.full(batch.visible.shape, 5.0))
    assert torch.isfinite(draws.residual).all() and draws.draw(32).xy.shape == (64, 16, 2)


def test_joined_tracks_hold_both_sets(small_store, scene):
    first, second = true_tracks(scene, 7), true_tracks(scene, 5, seed=1)
    both = first.joined(second)
    assert both.xy.shape == (12, 6, 2) and both.sigma.shape == both.seen.shape == (12, 6)
    for name, value in vars(both).items():
        assert torch.equal(value[:7], getattr(first, name))
        assert torch.equal(value[7:], getattr(second, name))
