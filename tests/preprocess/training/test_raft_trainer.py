"""Losses, exact resume, and weights on their way into the flow provider, on a tiny recipe."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.models.optical_flow import raft_small

from omni.errors import OmniError
from omni.field.checkpoint import load_checkpoint, save_checkpoint
from preprocess.flow.raft.network import Prediction
from preprocess.flow.raft.provider import RaftFlow
from preprocess.flow.raft.weights import Weights
from preprocess.training import raft_trainer
from preprocess.training.pairs import FlowPairs, PairSource
from preprocess.training.raft_trainer import (
    RaftTrainer,
    Recipe,
    _one_cycle,
    _plain,
    flow_loss,
    head_losses,
)

REPO = Path(__file__).resolve().parents[3]
TINY = Recipe(
    steps=4, batch=1, size=(128, 128), updates=2, textures=3, surfaces=5, samples=1, validation=1
)


def pairs(flow, visible):
    blank = torch.zeros(*flow.shape[:1], 3, *flow.shape[2:], dtype=torch.uint8)
    return FlowPairs(blank, blank, flow, visible, torch.ones_like(visible))


def test_flow_loss_is_the_discounted_error_of_every_update():
    truth = pairs(torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))
    truth.valid[0, 0] = False
    off = torch.ones(1, 2, 8, 8) * torch.tensor([3.0, 1.0]).reshape(1, 2, 1, 1)
    off[:, :, 0] = 1e6  # not valid, so not counted
    assert flow_loss([off, 2 * off], truth).item() == pytest.approx(0.8 * 2 + 4)
    truth.flow[0, 0, 1] = 500
    still = flow_loss([torch.zeros(1, 2, 8, 8)], truth).item()
    assert still == 0, "flow beyond any search is not trained on"


def test_the_sigma_loss_is_least_at_the_deviation_per_axis():
    torch.manual_seed(0)
    truth = pairs(torch.zeros(1, 2, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool))
    noise = 0.7 * torch.randn(1, 2, 64, 64)
    log_variances = torch.linspace(-3, 2, 51)
    shape = torch.ones(1, 64, 64)
    losses = [
        head_losses(Prediction([noise], 0 * shape, u * shape), truth)[1] for u in log_variances
    ]
    best = torch.exp(log_variances[torch.stack(losses).argmin()] / 2).item()
    assert best == pytest.approx(0.7, abs=0.04)


def test_the_occlusion_loss_counts_only_where_the_target_is_in_the_frame():
    visible = torch.ones(1, 16, 16, dtype=torch.bool)
    visible[0, :, 8:] = False
    flow = torch.zeros(1, 2, 16, 16)
    flow[0, 0, :, 12:] = 30  # leaves the frame
    right = torch.where(visible, -20.0, 20.0)
    right[0, :, 12:] = -20
    log_variance = torch.zeros(1, 16, 16)
    assert head_losses(Prediction([flow], right, log_variance), pairs(flow, visible))[0] < 1e-6
    assert head_losses(Prediction([flow], -right, log_variance), pairs(flow, visible))[0] > 10


def test_batches_are_decided_by_seed_and_index():
    first, again = (PairSource((128, 128), 3, 5, surfaces=5, samples=1) for _ in range(2))
    one, same, other = first.batch(7, 2), again.batch(7, 2), first.batch(8, 2)
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(same, name)), name
    assert not torch.equal(one.first, other.first)
    assert one.first.shape == (2, 3, 128, 128) and one.flow.shape == (2, 2, 128, 128)
    alone = first.batch(7, 1)  # half of one scene
    torch.testing.assert_close(alone.flow[0], one.flow[0], atol=1e-3, rtol=0)
    near, far = (first.batch(3, 4, gap).flow.norm(dim=1).mean() for gap in (1, 16))
    assert far > 2 * near


def test_a_scene_is_a_pair_in_both_directions():
    pairs = PairSource((128, 128), 3, 5, surfaces=5, samples=1).batch(2, 2)
    assert torch.equal(pairs.first[0], pairs.second[1])
    assert torch.equal(pairs.first[1], pairs.second[0])
    rows, columns = torch.nonzero(pairs.visible[0], as_tuple=True)
    there = pairs.flow[0, :, rows, columns]
    x = (columns + there[0].round().long()).clamp(0, 127)
    y = (rows + there[1].round().long()).clamp(0, 127)
    closure = (there + pairs.flow[1, :, y, x]).norm(dim=0)
    assert there.norm(dim=0).mean() > 0.3 and closure.median() < 0.1


def test_the_loss_falls_on_pairs_seen_again(tmp_path):
    trainer = RaftTrainer(replace(TINY, steps=16, updates=3), tmp_path)
    same = trainer.source.batch(1, 1)
    trainer.source.batch = lambda index, count: same
    losses = [trainer.train_step() for _ in range(14)]
    for name in ("loss/flow", "loss/occlusion"):
        assert min(step[name] for step in losses[-3:]) < 0.8 * losses[0][name], name


@pytest.mark.slow
def test_a_moving_scene_seen_again_and_again_is_matched(tmp_path):
    """Far below the error of no motion: signs, axes and gradients of the whole path are right."""
    recipe = replace(TINY, steps=150, batch=2, updates=6, textures=20, samples=2, surfaces=7)
    trainer = RaftTrainer(replace(recipe, rate=5e-4), tmp_path)
    same = trainer.source.batch(16, 2, 4)
    trainer.source.batch = lambda index, count: same
    for _ in range(recipe.steps):
        trainer.train_step()
    path = tmp_path / "weights.safetensors"
    trainer.save()
    provider = RaftFlow(Weights(path, "small", "given"))
    images = (same.first[0], same.second[0])
    flow = provider.estimate(*(image.movedim(0, -1).contiguous().numpy() for image in images))
    truth = same.flow[0].movedim(0, -1).numpy()
    still, error = (np.linalg.norm(f, axis=-1).mean() for f in (truth, flow - truth))
    assert still > 2 and error < 0.4 * still


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, and what it reported."""
    folder, scalars = tmp_path_factory.mktemp("raft"), []
    trainer = RaftTrainer(TINY, folder)
    trainer.run(lambda step, values: scalars.append((step, values)), validate_every=4)
    return folder, trainer, scalars


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_bytes(finished, tmp_path):
    folder, trainer, _ = finished
    interrupted = RaftTrainer(TINY, tmp_path)
    interrupted.train_step()
    interrupted.train_step()
    interrupted.save()
    resumed = RaftTrainer(TINY, tmp_path)
    resumed.run(validate_every=4)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    written = [(path / "weights.safetensors").read_bytes() for path in (folder, tmp_path)]
    assert written[0] == written[1]


@pytest.mark.slow
def test_validation_reports_every_set_before_and_after(finished):
    _, trainer, scalars = finished
    validated = {step: values for step, values in scalars if "epe/gap1" in values}
    assert sorted(validated) == [0, 4]
    assert "seconds_per_step" not in validated[0] and validated[4].pop("seconds_per_step") > 0
    for values in validated.values():
        assert len(values) == 12 and all(np.isfinite(v) and v >= 0 for v in values.values())
        assert values["occlusion_accuracy/gap1"] <= 1 and values["within_1_sigma/gap1"] <= 1
    assert trainer.validate() == validated[4], "the sets are fixed"


@pytest.mark.slow
def test_weights_load_as_a_plain_torchvision_model_and_in_the_provider(finished):
    folder, trainer, _ = finished
    path = folder / "weights.safetensors"
    assert path.stat().st_size < 6e6
    with safe_open(path, "pt") as file:
        assert '"variant": "small"' in file.metadata()["training"]
    plain = raft_small(weights=None).eval()
    missing, extra = plain.load_state_dict(load_file(path), strict=False)
    assert not missing and all(name.startswith("heads.") for name in extra)
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    with torch.no_grad():
        batches = (torch.from_numpy(i).movedim(-1, 0)[None] / 127.5 - 1 for i in images)
        expected = plain(*batches, num_flow_updates=20)[-1][0].movedim(0, -1).numpy()
    provider = RaftFlow(Weights(path, "small", "given"))
    (motion,) = provider.estimate_batch([(*images, None)])
    np.testing.assert_allclose(motion.flow, expected, atol=1e-3)
    assert provider.predicts_uncertainty and motion.occlusion.shape == motion.sigma.shape == (
        128,
        128,
    )
    assert (motion.sigma > 0).all() and ((motion.occlusion >= 0) & (motion.occlusion <= 1)).all()


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused(finished):
    with pytest.raises(OmniError, match="another recipe"):
        RaftTrainer(replace(TINY, rate=1e-3), finished[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (120, 128)}, "multiples of 8"),
        ({"size": (128, 130)}, "multiples of 8"),
        ({"steps": 0}, "steps = 0 is too small"),
        ({"surfaces": 3}, "at least 4"),
        ({"seed": 2**31 - 1}, "validation and benchmark"),
        ({"rate": float("nan")}, "rate = nan"),
        ({"variant": "huge"}, "one of small, large"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(wrong, message):
    with pytest.raises(OmniError, match=message):
        replace(TINY, **wrong)


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for state, message in (
        ({"step": 3}, "something else's checkpoint"),
        ({"recipe": _plain(TINY), "step": 3, "network": {}}, "does not fit itself: delete it"),
    ):
        save_checkpoint(path, state)
        with pytest.raises(OmniError, match=message):
            RaftTrainer(TINY, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OmniError, match="checkpoint.pt is damaged: delete it to start anew"):
        RaftTrainer(TINY, tmp_path)


def test_a_batch_without_a_finite_gradient_is_left_out_with_a_warning(tmp_path, caplog):
    trainer = RaftTrainer(TINY, tmp_path)
    broken = trainer.source.batch(0, 1)
    broken.flow[0, 0, 5, 5] = np.nan
    trainer.source.batch = lambda index, count: broken
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.train_step()
    assert "step 0: gradient not finite, batch left out" in caplog.text and trainer.step == 1
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_heads_do_not_shorten_the_steps_of_the_flow(tmp_path, monkeypatch):
    """However large their loss, the flow's gradient is clipped as if there were none."""
    gradients = []
    for factor in (1, 1e6):
        trainer = RaftTrainer(TINY, tmp_path)
        scales = [factor * torch.ones(())] * 2
        monkeypatch.setattr(
            raft_trainer,
            "head_losses",
            lambda *given, scales=scales: [
                a * b for a, b in zip(head_losses(*given), scales, strict=True)
            ],
        )
        trainer.train_step()
        parts = trainer.network.raft, trainer.network.heads
        gradients.append([torch.cat([p.grad.ravel() for p in m.parameters()]) for m in parts])
    (flow, _), (again, heads) = gradients
    assert torch.equal(flow, again)
    assert flow.norm() <= 1.001 and heads.norm().item() == pytest.approx(1, rel=1e-3)


def test_the_rate_rises_for_a_twentieth_of_the_run_and_falls_to_nothing():
    rates = np.array([_one_cycle(step / 1000) for step in range(1001)])
    assert rates[0] == pytest.approx(0.01) and rates[1000] == 0
    assert 48 <= rates.argmax() <= 50 and rates.max() == 1
    assert (np.diff(rates[:49]) > 0).all() and (np.diff(rates[50:]) < 0).all()


@pytest.mark.slow
def test_the_large_network_keeps_its_batch_statistics_in_the_second_half(tmp_path):
    trainer = RaftTrainer(replace(TINY, variant="large", updates=1, steps=4), tmp_path)
    norm = next(m for m in trainer.network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    changed = []
    for step in (0, 3):
        before, trainer.step = norm.running_mean.clone(), step
        trainer.train_step()
        changed.append(not torch.equal(norm.running_mean, before))
    assert changed == [True, False]


@pytest.mark.slow
def test_the_script_stops_on_a_signal_and_the_same_command_continues(tmp_path):
    """Ctrl-C after the first steps, one clear line; then to the bytes of a run without."""
    options = "--steps 6 --batch 1 --size 128 128 --updates 2 --textures 3 --surfaces 5"
    options += " --samples 1 --validation 1 --threads 1 --device cpu"
    command = [sys.executable, str(REPO / "scripts" / "train_raft.py"), *options.split()]

    def start(folder):
        return subprocess.Popen(
            [*command, str(folder)], stderr=subprocess.PIPE, text=True, cwd=REPO
        )

    process = start(tmp_path / "a")
    for line in process.stderr:
        if line.startswith("step 0:"):
            break
    process.send_signal(signal.SIGINT)
    assert "the same command continues" in process.stderr.read()
    assert process.wait() == 1
    assert 0 < torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["step"] < 6
    again, straight = start(tmp_path / "a"), start(tmp_path / "b")
    assert "continuing at step" in again.communicate()[1]
    straight.communicate()
    assert again.returncode == straight.returncode == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert any((tmp_path / "a" / "tensorboard").iterdir())
    log = tmp_path / "c"
    log.write_text("a file")
    refused = start(log)
    assert "cannot write TensorBoard files" in refused.communicate()[1] and refused.returncode == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_does_what_a_cpu_does(tmp_path):
    """The minute of checking before hours of training: pairs, training, resume, provider."""
    size, look = (128, 160), {"surfaces": 7, "samples": 2}
    cpu, cuda = (PairSource(size, 6, 5, device, **look).batch(3, 8) for device in ("cpu", "cuda"))
    both = cpu.valid & cuda.valid.cpu()
    difference = (cpu.flow - cuda.flow.cpu()).norm(dim=1)[both]
    assert both.float().mean() > 0.99 and difference.median() < 1e-3
    assert (cpu.visible == cuda.visible.cpu()).float().mean() > 0.999

    recipe = replace(TINY, steps=6, batch=4, updates=4)
    trainer = RaftTrainer(recipe, tmp_path, "cuda")
    before = next(trainer.network.raft.parameters()).clone()
    losses = [trainer.train_step() for _ in range(3)]
    assert all(np.isfinite(float(value)) for step in losses for value in step.values())
    assert not torch.equal(next(trainer.network.raft.parameters()), before)
    trainer.save()
    resumed = RaftTrainer(recipe, tmp_path, "cuda")
    assert resumed.step == 3
    counters = [state["step"] for state in resumed.optimizer.state.values()]
    assert counters and all(count.device.type == "cpu" and count == 3 for count in counters)
    resumed.run()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6

    weights = Weights(tmp_path / "weights.safetensors", "small", "given")
    images = [image[0].movedim(0, -1).contiguous().numpy() for image in (cpu.first, cpu.second)]
    exact, half = (RaftFlow(weights, device).estimate(*images) for device in ("cpu", "cuda"))
    error, length = (np.linalg.norm(part, axis=-1).mean() for part in (half - exact, exact))
    assert error < 0.05 * length
