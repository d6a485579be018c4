"""Whom the network believes; its training is tried on witnesses of whom one is always right."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from omni.consensus import NEARBY, Consensus, believe, circles, joined, trained
from omni.witnesses import NAMED, PATH, WITNESSES, Witnesses

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_consensus.py"
POINTS, TIMES, FEATURES = 5, 7, 9


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Consensus(FEATURES, 16).eval()


def heard(witnesses=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(POINTS * TIMES, witnesses, FEATURES, generator=generator)
    valid = torch.rand(POINTS * TIMES, witnesses, generator=generator) < 0.7
    valid[:, PATH] = True
    return values, valid, 6 * torch.rand(POINTS * TIMES, witnesses, 2, generator=generator)


def says(xy, valid=None):
    """Witnesses with these positions (W, N, T, 2) of whom nothing else matters."""
    shape = xy.shape[:3]
    blank = {name: np.zeros(shape) for name in "sigma level error agree covered stretch".split()}
    valid = np.ones(shape[:2], bool) if valid is None else valid
    return Witnesses(
        xy=xy.astype(np.float32), offset=np.zeros((*shape[:2], 2)), valid=valid, **blank
    )


def test_the_order_of_witnesses_does_not_matter(network):
    values, valid, xy = heard()
    order = torch.tensor([PATH, *torch.randperm(11).add(1).tolist()])
    score, judged = network(values, valid, xy)
    again, same = network(values[:, order], valid[:, order], xy[:, order])
    torch.testing.assert_close(again, score[:, order])
    torch.testing.assert_close(same, judged)


def test_a_witness_that_is_not_valid_changes_nothing(network):
    values, valid, xy = heard()
    score, judged = network(values, valid, xy)
    assert torch.isneginf(score[~valid]).all() and torch.isfinite(score[valid]).all()
    nonsense = torch.where(valid[..., None], values, 1e3)
    elsewhere = torch.where(valid[..., None], xy, 1e3)
    again, same = network(nonsense, valid, elsewhere)
    torch.testing.assert_close(again, score)
    torch.testing.assert_close(same, judged)


def test_witnesses_hear_those_who_name_the_same_place_and_nobody_far_away(network):
    values, _, xy = heard()
    valid = torch.ones(xy.shape[:2], dtype=torch.bool)
    xy[:, 6:] += 400
    score, _ = network(values, valid, xy)
    louder = values.clone()
    louder[:, -1] += 1
    before, after = (circles(code, valid, xy) for code in (values, louder))
    assert (before[:, :6] == after[:, :6]).all()
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()
    moved, _ = network(values, valid, xy + 17)
    torch.testing.assert_close(moved, score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_two_stories_are_not_averaged(network, scale):
    """Half of the witnesses stand together, the others, likewise, further off than NEARBY."""
    camps = np.zeros((8, POINTS, TIMES, 2))
    camps[::2, ..., 0] = 1.5 * NEARBY * scale
    camps += np.random.default_rng(0).uniform(-0.2, 0.2, camps.shape) * scale
    values = torch.randn(POINTS, TIMES, 8, FEATURES, generator=torch.Generator().manual_seed(1))
    x = believe(network, values, says(camps), scale).xy[..., 0] / (1.5 * NEARBY * scale)
    assert ((abs(x) < 0.1) | (abs(x - 1) < 0.1)).all()
    assert (x < 0.5).any() and (x > 0.5).any()


def test_the_verdict_scales_with_the_picture(network):
    xy = np.random.default_rng(0).uniform(0, 3, (8, POINTS, TIMES, 2))
    values = torch.randn(POINTS, TIMES, 8, FEATURES)
    small, large = (believe(network, values, says(xy * s), s) for s in (1.0, 2.0))
    np.testing.assert_allclose(large.xy, 2 * small.xy, rtol=1e-5)
    np.testing.assert_allclose(large.sigma, 2 * small.sigma, rtol=1e-5)
    np.testing.assert_array_equal(large.trust, small.trust)


def test_parts_are_joined_in_order(network):
    xy = np.random.default_rng(0).uniform(0, 3, (8, POINTS, TIMES, 2))
    values = torch.randn(POINTS, TIMES, 8, FEATURES)
    whole = believe(network, values, says(xy), 1.0)
    parts = [
        believe(network, values[rows], says(xy[:, rows]), 1.0)
        for rows in (slice(0, 2), slice(2, POINTS))
    ]
    for name, value in vars(joined(parts)).items():
        np.testing.assert_allclose(value, getattr(whole, name), atol=1e-5)


def test_the_shipped_network_knows_the_features_of_today(fitted):
    """Of a clip without noise: nothing infinite, and as many features as it was trained on."""
    from omni.readout import Reader

    reader = Reader(fitted.trainer.store, fitted.trainer.field.eval(), chunk=4096)
    queries = np.array([[0, 5, 5], [2, 30.3, 40.2], [5, 47.9, 63.9], [3, 0.1, 0.1]])
    ((said, values),) = reader.testimony(queries)
    assert values.shape == (4, 6, WITNESSES, len(trained().mean))
    assert torch.isfinite(values).all()
    assert said.valid[: len(NAMED)].all() and not said.valid[:, 3].all()


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def clips(script):
    """Clips in which one feature says how far a witness is off, another whether he is hidden."""
    generator = torch.Generator().manual_seed(0)

    def clip(times):
        off = 40 * torch.rand(64, times, 10, generator=generator) ** 3
        hidden = torch.rand(64, times, generator=generator) < 0.5
        values = torch.randn(64, times, 10, FEATURES, generator=generator)
        values[..., 3] = off.add(0.1).log()
        values[..., 5] = hidden[..., None].float()
        angle = 6.3 * torch.rand(off.shape, generator=generator)
        where = off[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
        asked = torch.zeros(64, times, dtype=torch.bool)
        asked[:, 0] = True
        return script["Clip"](values.half(), torch.ones(64, 10).bool(), where, ~hidden, asked)

    return [clip(TIMES), clip(2 * TIMES), clip(TIMES)]


def test_training_finds_the_witness_who_is_right_and_how_right_he_is(script, clips):
    *known, test = clips
    network = script["train"](known, steps=300)
    valid = torch.ones(64 * TIMES, 10).bool()
    score, judged = network(test.values.float().flatten(0, 1), valid, test.off.flatten(0, 1))
    error = test.off.norm(dim=-1).flatten(0, 1)
    believed = (score.softmax(-1) * error).sum(-1)
    assert believed.mean() < 1.5 * error.amin(-1).mean() < 0.2 * error.mean()
    seen = test.visible.flatten()
    assert judged[seen, 1].min() > 0 > judged[~seen, 1].max()
    assert (judged[seen, 0] > 0).float().mean() > 0.95
    best = score.argmax(-1)[:, None, None]
    axis = test.off.flatten(0, 1).take_along_dim(best, 1)[:, 0][seen].abs()
    within = (axis.clamp(min=0.02) <= judged[seen, 2:].exp()).float().mean()
    assert 0.45 < within < 0.95, "72 % were asked for"


def test_a_training_results_in_the_mean_of_the_weights_of_its_second_half(script, clips):
    seen = []

    def note(optimizer, *_):
        seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    with register_optimizer_step_post_hook(note):
        network = script["train"](clips, steps=10)
    assert len(seen) == 10
    for result, *steps in zip(network.parameters(), *seen[5:], strict=True):
        torch.testing.assert_close(result, torch.stack(steps).mean(0))
        assert not torch.equal(result, steps[-1])
