"""The selection network, and its training on candidates whose errors are known from a feature."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from omni.tracking.selection.candidates import FUSED, NUM_CANDIDATES, SOURCES, Candidates
from omni.tracking.selection.network import (
    AVERAGING_RADIUS,
    Selection,
    SelectionNetwork,
    pool_neighbours,
    select_candidates,
    trained_network,
)

SCRIPT = Path(__file__).resolve().parents[4] / "scripts" / "train_selection.py"
POINTS, TIMES, FEATURES = 5, 7, 9


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SelectionNetwork(FEATURES, 16).eval()


def random_inputs(num_candidates=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(POINTS * TIMES, num_candidates, FEATURES, generator=generator)
    valid = torch.rand(POINTS * TIMES, num_candidates, generator=generator) < 0.7
    valid[:, FUSED] = True
    return values, valid, 6 * torch.rand(POINTS * TIMES, num_candidates, 2, generator=generator)


def candidates_at(xy, valid=None):
    """Candidates with these positions (K, N, T, 2); nothing else of them matters."""
    shape = xy.shape[:3]
    blank = {
        name: np.zeros(shape) for name in "sigma level error num_fused occluded stretch".split()
    }
    valid = np.ones(shape[:2], bool) if valid is None else valid
    return Candidates(
        xy=xy.astype(np.float32), offset=np.zeros((*shape[:2], 2)), valid=valid, **blank
    )


def test_the_order_of_candidates_does_not_matter(network):
    values, valid, xy = random_inputs()
    order = torch.tensor([FUSED, *torch.randperm(11).add(1).tolist()])
    score, predicted = network(values, valid, xy)
    again, same = network(values[:, order], valid[:, order], xy[:, order])
    torch.testing.assert_close(again, score[:, order])
    torch.testing.assert_close(same, predicted)


def test_a_candidate_that_is_not_valid_changes_nothing(network):
    values, valid, xy = random_inputs()
    score, predicted = network(values, valid, xy)
    assert torch.isneginf(score[~valid]).all() and torch.isfinite(score[valid]).all()
    arbitrary = torch.where(valid[..., None], values, 1e3)
    elsewhere = torch.where(valid[..., None], xy, 1e3)
    again, same = network(arbitrary, valid, elsewhere)
    torch.testing.assert_close(again, score)
    torch.testing.assert_close(same, predicted)


def test_pooling_is_over_candidates_at_nearby_positions_alone(network):
    values, _, xy = random_inputs()
    valid = torch.ones(xy.shape[:2], dtype=torch.bool)
    xy[:, 6:] += 400
    score, _ = network(values, valid, xy)
    changed = values.clone()
    changed[:, -1] += 1
    before, after = (pool_neighbours(code, valid, xy) for code in (values, changed))
    assert (before[:, :6] == after[:, :6]).all()
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()
    moved, _ = network(values, valid, xy + 17)
    torch.testing.assert_close(moved, score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_two_distant_groups_of_candidates_are_not_averaged(network, scale):
    """Two groups of candidates, farther from each other than AVERAGING_RADIUS."""
    groups = np.zeros((8, POINTS, TIMES, 2))
    groups[::2, ..., 0] = 1.5 * AVERAGING_RADIUS * scale
    groups += np.random.default_rng(0).uniform(-0.2, 0.2, groups.shape) * scale
    values = torch.randn(POINTS, TIMES, 8, FEATURES, generator=torch.Generator().manual_seed(1))
    x = select_candidates(network, values, candidates_at(groups), scale).xy[..., 0] / (
        1.5 * AVERAGING_RADIUS * scale
    )
    assert ((abs(x) < 0.1) | (abs(x - 1) < 0.1)).all()
    assert (x < 0.5).any() and (x > 0.5).any()


def test_the_selection_scales_with_the_frame_size(network):
    xy = np.random.default_rng(0).uniform(0, 3, (8, POINTS, TIMES, 2))
    values = torch.randn(POINTS, TIMES, 8, FEATURES)
    small, large = (
        select_candidates(network, values, candidates_at(xy * s), s) for s in (1.0, 2.0)
    )
    np.testing.assert_allclose(large.xy, 2 * small.xy, rtol=1e-5)
    np.testing.assert_allclose(large.sigma, 2 * small.sigma, rtol=1e-5)
    np.testing.assert_array_equal(large.trust, small.trust)


def test_parts_are_joined_in_order(network):
    xy = np.random.default_rng(0).uniform(0, 3, (8, POINTS, TIMES, 2))
    values = torch.randn(POINTS, TIMES, 8, FEATURES)
    whole = select_candidates(network, values, candidates_at(xy), 1.0)
    parts = [
        select_candidates(network, values[rows], candidates_at(xy[:, rows]), 1.0)
        for rows in (slice(0, 2), slice(2, POINTS))
    ]
    for name, value in vars(Selection.joined(parts)).items():
        np.testing.assert_allclose(value, getattr(whole, name), atol=1e-5)


def test_the_shipped_network_fits_the_features(fitted):
    """Of a clip without noise: all finite, and as many features as the network was trained on."""
    from omni.tracking.readout import Reader

    reader = Reader(fitted.trainer.store, fitted.trainer.field.eval(), chunk=4096)
    queries = np.array([[0, 5, 5], [2, 30.3, 40.2], [5, 47.9, 63.9], [3, 0.1, 0.1]])
    ((candidates, values),) = reader.candidates(queries)
    assert values.shape == (4, 6, NUM_CANDIDATES, len(trained_network().mean))
    assert torch.isfinite(values).all()
    assert candidates.valid[: len(SOURCES)].all() and not candidates.valid[:, 3].all()


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def clips(script):
    """Clips in which one feature is the error of a candidate and another the occlusion."""
    generator = torch.Generator().manual_seed(0)

    def clip(times):
        distance = 40 * torch.rand(64, times, 10, generator=generator) ** 3
        occluded = torch.rand(64, times, generator=generator) < 0.5
        values = torch.randn(64, times, 10, FEATURES, generator=generator)
        values[..., 3] = distance.add(0.1).log()
        values[..., 5] = occluded[..., None].float()
        angle = 6.3 * torch.rand(distance.shape, generator=generator)
        error = distance[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
        queried = torch.zeros(64, times, dtype=torch.bool)
        queried[:, 0] = True
        return script["Clip"](values.half(), torch.ones(64, 10).bool(), error, ~occluded, queried)

    return [clip(TIMES), clip(2 * TIMES), clip(TIMES)]


def test_training_selects_the_best_candidate_and_predicts_its_error(script, clips):
    *known, test = clips
    network = script["train"](known, steps=300)
    valid = torch.ones(64 * TIMES, 10).bool()
    score, predicted = network(test.values.float().flatten(0, 1), valid, test.error.flatten(0, 1))
    error = test.error.norm(dim=-1).flatten(0, 1)
    selected = (score.softmax(-1) * error).sum(-1)
    assert selected.mean() < 1.5 * error.amin(-1).mean() < 0.2 * error.mean()
    seen = test.visible.flatten()
    assert predicted[seen, 1].min() > 0 > predicted[~seen, 1].max()
    assert (predicted[seen, 0] > 0).float().mean() > 0.95
    best = score.argmax(-1)[:, None, None]
    axis = test.error.flatten(0, 1).take_along_dim(best, 1)[:, 0][seen].abs()
    within = (axis.clamp(min=0.02) <= predicted[seen, 2:].exp()).float().mean()
    assert 0.45 < within < 0.95, "the quantile trained for is 72 %"


def test_a_training_results_in_the_mean_of_the_weights_of_its_second_half(script, clips):
    seen = []

    def record(optimizer, *_):
        seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    with register_optimizer_step_post_hook(record):
        network = script["train"](clips, steps=10)
    assert len(seen) == 10
    for result, *steps in zip(network.parameters(), *seen[5:], strict=True):
        torch.testing.assert_close(result, torch.stack(steps).mean(0))
        assert not torch.equal(result, steps[-1])
