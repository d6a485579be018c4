import logging
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from omni.checkpoint import load_checkpoint, save_checkpoint
from omni.config import Term
from omni.coords import grid_queries, inside
from omni.errors import DamagedError
from omni.initialize import surface_depth
from omni.readout import Reader
from omni.signals import Interrupted
from omni.trainer import MAX_ROLLBACKS, MOST_IN_FRONT, Trainer, fit_key
from preprocess.pairs import schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_config(small_config):
    """Enough to test the loop, whatever it learns."""
    return replace(
        small_config,
        model=replace(small_config.model, couplings=2, hidden=8, grid_levels=2, grid_log2_size=10),
        render=replace(small_config.render, samples=2),
        sampling=replace(small_config.sampling, pairs=4, points=8),
    )


def trainer(store, config, path, **optim):
    """A trainer whose settings in `optim` are changed."""
    return Trainer(store, replace(config, optim=replace(config.optim, **optim)), path, CPU)


def at_step(step, action):
    """A scalar callback that acts once, when `step` is first reached."""
    pending = [action]

    def callback(now, values):
        if now == step and pending:
            pending.pop()()

    return callback


def differences(a, b):
    """Names of the entries in which two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [""]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [f"{key}.{name}" for key in a for name in differences(a[key], b[key])]
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return [f"{i}.{name}" for i in range(len(a)) for name in differences(a[i], b[i])]
    return [] if a == b else [""]


@pytest.fixture(scope="module")
def uninterrupted(small_store, tiny_config, tmp_path_factory):
    """The state after 20 steps without a break."""
    path = tmp_path_factory.mktemp("uninterrupted") / "checkpoint.pt"
    run = trainer(small_store, tiny_config, path, steps=20, evaluate_every=8, log_every=1)
    run.run()
    return load_checkpoint(path)


def test_fitting_lowers_the_loss_and_the_held_out_error(fitted):
    """The background is explained from the start; the square is what is left to learn."""
    values = [values for _, values in fitted.scalars if "loss/total" in values]
    for term, most in (("flow", 0.2), ("photometric", 0.5)):  # the total gains a term on the way
        losses = [value[f"loss/{term}"] for value in values]
        assert sum(losses[-3:]) < most * sum(losses[:2]), term
    assert fitted.before["mean"] > 0.5
    assert fitted.trainer.history[-1]["mean"] < 0.2 * fitted.before["mean"]
    assert [entry["step"] for entry in fitted.trainer.history] == [50, 100, 150]


def test_every_weighted_loss_term_is_reported(fitted):
    _, values = fitted.scalars[0]
    terms = {"flow", "surface", "photometric", "constancy", "acceleration", "distortion"}
    terms |= {"depth_range", "total"}
    assert {f"loss/{name}" for name in terms} <= values.keys()
    assert {"lr/mapping", "lr/motion"} <= values.keys()


def test_a_fit_without_a_break_repeats_bit_for_bit(
    small_store, tiny_config, tmp_path, uninterrupted
):
    path = tmp_path / "checkpoint.pt"
    trainer(small_store, tiny_config, path, steps=20, evaluate_every=8, log_every=1).run()
    assert differences(load_checkpoint(path), uninterrupted) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [5, 8])
def test_a_stopped_and_resumed_fit_equals_an_uninterrupted_one_bit_for_bit(
    small_store, tiny_config, tmp_path, uninterrupted, number, step
):
    path = tmp_path / "checkpoint.pt"
    settings = dict(steps=20, evaluate_every=8, log_every=1)
    first = trainer(small_store, tiny_config, path, **settings)
    first.on_scalars = at_step(step, lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert signal.getsignal(number) is handler, "the previous handler is back"
    assert step <= load_checkpoint(path)["step"] <= step + 1
    second = trainer(small_store, tiny_config, path, **settings)
    second.run()
    assert differences(load_checkpoint(path), uninterrupted) == []


def test_a_fit_with_the_wrong_depth_order_starts_anew_from_the_opposite_one(
    small_store, small_config, tmp_path, monkeypatch, caplog
):
    """What moves is taken to be near; here it is not, and nothing may be learned."""

    def opposite(store, motion, cells):
        return 2 - surface_depth(store, motion, cells)

    monkeypatch.setattr("omni.trainer.surface_depth", opposite)
    still = dict(lr_mapping=0.0, lr_surface=0.0, lr_motion=0.0, lr_code=0.0)
    settings = dict(steps=20, evaluate_every=4, patience=0, log_every=1, **still)
    path, other = tmp_path / "checkpoint.pt", tmp_path / "other.pt"
    run = trainer(small_store, small_config, path, **settings)
    assert run.evaluate()["in_front"] > MOST_IN_FRONT
    run.run()
    assert run.restarts == 1 and "starting the fit anew" in caplog.text
    assert run.history[-1]["in_front"] < MOST_IN_FRONT / 2
    assert [entry["step"] for entry in run.history] == [4, 8, 12, 16, 20]

    broken = trainer(small_store, small_config, other, **settings)
    broken.on_scalars = lambda step, values: broken.restarts and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    trainer(small_store, small_config, other, **settings).run()
    assert differences(load_checkpoint(other), load_checkpoint(path)) == []


@pytest.mark.parametrize("seconds", [0, 1e6], ids=["periodic save", "last save"])
def test_a_signal_during_a_save_stops_after_it(
    small_store, tiny_config, tmp_path, monkeypatch, seconds
):
    """Also the last one: what comes next (views, an export) may take long."""
    path = tmp_path / "checkpoint.pt"
    run = trainer(small_store, tiny_config, path, steps=3, checkpoint_seconds=seconds)
    run.on_images = lambda trainer: pytest.fail("went on")

    def interrupted_save(path, state):
        if state["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, state)

    monkeypatch.setattr("omni.trainer.save_checkpoint", interrupted_save)
    with pytest.raises(Interrupted):
        run.run()
    state = load_checkpoint(path)
    assert state["step"] == 3 and state["finished"]


def mutated(state, *path, to):
    """`state` with the entry at `path` replaced, or transformed by a function."""
    entry = state
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = to(entry[path[-1]]) if callable(to) else to
    return state


MOMENT = "optimizer", "state", 0, "exp_avg"
MUTATIONS = {
    "moments of another shape": (*MOMENT, lambda x: x.flatten()[:1].clone()),
    "moments that only declare their size": (*MOMENT, lambda x: x.new_zeros(1).expand(x.shape)),
    "moments of another type": (*MOMENT, lambda x: x.double()),
    "moments that are no tensor": (*MOMENT, 1.0),
    "steps of another shape": ("optimizer", "state", 0, "step", torch.ones(3)),
    "state of no parameter": ("optimizer", "state", lambda x: x | {999: x[0]}),
    "state by name": ("optimizer", "state", lambda x: x | {"0": x[0]}),
    "a parameter of another shape": ("field", "motion.matrices", torch.ones(2)),
    "a tensor in the sampler's place": ("sampler", torch.ones(1)),
    "residuals of another shape": ("sampler", "residual", torch.ones(1)),
    "residuals of another type": ("sampler", "residual", lambda x: x.double()),
    "residuals that are not finite": ("sampler", "residual", lambda x: x * float("nan")),
    "negative residuals": ("sampler", "residual", lambda x: -x),
    "residuals of zero": ("sampler", "residual", lambda x: 0 * x),
    "huge residuals": ("sampler", "residual", lambda x: 1e38 * x),
    "a short generator": ("sampler", "generator", torch.zeros(8, dtype=torch.uint8)),
    "a generator of ones": ("sampler", "generator", lambda x: torch.full_like(x, 255)),
    "a negative step": ("step", -1),
    "a fractional step": ("step", 1.5),
    "a huge step": ("step", 1 << 40),
    "a true step": ("step", True),
    "rollbacks as text": ("rollbacks", "0"),
    "huge halvings": ("halvings", 1 << 60),
    "no rate": ("rate", 0.0),
    "a rate that is not a number": ("rate", float("nan")),
    "a rate as a tensor": ("rate", torch.ones(1)),
    "history without a mean": ("history", [{"step": 1}]),
    "history of text": ("history", 0, "mean", "0.5"),
    "history that is none": ("history", {}),
    "a good state that is none": ("good", 3),
    "a good state with other moments": ("good", *MOMENT, torch.zeros(1)),
}


@pytest.fixture(scope="module")
def halfway(small_store, tiny_config, tmp_path_factory):
    """A checkpoint after 4 of 6 steps, with a good state after 2."""
    path = tmp_path_factory.mktemp("halfway") / "checkpoint.pt"
    run = trainer(small_store, tiny_config, path, steps=6, evaluate_every=2, log_every=1)
    run.on_scalars = at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.run()
    return path


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_crafted_checkpoint_is_refused(small_store, tiny_config, tmp_path, halfway, what):
    *path, to = MUTATIONS[what]
    state = mutated(load_checkpoint(halfway), *path, to=to)
    save_checkpoint(tmp_path / "c.pt", state)
    run = trainer(small_store, tiny_config, tmp_path / "c.pt", steps=6, evaluate_every=2)
    with pytest.raises(DamagedError, match=r"c\.pt does not fit itself"):
        run.run()


CRAFTED = """
import sys, torch
from pathlib import Path
from omni.checkpoint import load_checkpoint, restore_optimizer
big = torch.nn.Parameter(torch.ones(1 << 22))
adam = torch.optim.Adam([big], fused=True)
state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
saved = {"state": {0: state}, "param_groups": adam.state_dict()["param_groups"]}
(restore_optimizer if sys.argv[1] == "checked" else torch.optim.Adam.load_state_dict)(adam, saved)
big.grad = torch.ones_like(big)
adam.step()
"""


def test_moments_of_another_shape_never_reach_the_optimizer():
    """In a process of its own: unchecked, 16 MB beyond the end of one number are written."""
    codes = {}
    for how in ("checked", "unchecked"):
        command = [sys.executable, "-c", CRAFTED, how]
        codes[how] = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "ValueError: state that does not fit its parameter" in codes["checked"].stderr
    assert codes["unchecked"].returncode < 0, "else this test says nothing"


def test_nothing_of_a_batch_is_held_while_it_is_halved(small_store, tiny_config, tmp_path):
    """The memory that ran out must be free before the next, smaller batch."""
    run = trainer(small_store, tiny_config, tmp_path / "c.pt", steps=3)
    alive, draw, halve, seen = [], run.sampler.draw, run._halve, []

    def watched_draw(limit):
        batch = draw(limit)
        alive.append(weakref.ref(batch.xy))
        return batch

    def watched_halve():
        frame = sys._getframe(1)
        seen.append([name for name, value in frame.f_locals.items() if value is not None])
        assert alive.pop()() is None
        halve()

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.sampler.draw, run._halve = watched_draw, watched_halve
    handle = run.field.motion.matrices.register_hook(fail)
    assert run.train_step() is None and seen == [["self", "fraction"]]
    handle.remove()
    assert run.train_step() is not None and run.sampler.batch_pairs == 2


def test_a_finished_fit_is_not_done_again(small_store, tiny_config, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer(small_store, tiny_config, path, steps=3).run()
    written = path.stat().st_mtime_ns
    again = trainer(small_store, tiny_config, path, steps=3)
    again.run()
    assert again.step == 3 and path.stat().st_mtime_ns == written


def test_other_settings_start_the_fit_anew(small_store, tiny_config, tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    trainer(small_store, tiny_config, path, steps=3).run()
    other = trainer(small_store, tiny_config, path, steps=2)
    with caplog.at_level(logging.WARNING, "omni"):
        other.run()
    assert other.step == 2 and "starting it anew" in caplog.text


def test_the_key_ignores_what_cannot_change_the_result(small_store, tiny_config):
    key = fit_key(small_store, tiny_config)
    same = replace(tiny_config, threads=3, optim=replace(tiny_config.optim, log_every=7))
    assert fit_key(small_store, same) == key
    for other in (
        replace(tiny_config, seed=1),
        replace(tiny_config, model=replace(tiny_config.model, hidden=33)),
        replace(tiny_config, flow=replace(tiny_config.flow, cycle_threshold=2.0)),
    ):
        assert fit_key(small_store, other) != key


def test_a_damaged_checkpoint_is_replaced_by_a_new_fit(small_store, tiny_config, tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"cut short")
    with caplog.at_level(logging.WARNING, "omni"):
        trainer(small_store, tiny_config, path, steps=2).run()
    assert load_checkpoint(path)["step"] == 2 and "damaged" in caplog.text


def poison(run, name):
    def action():
        with torch.no_grad():
            run.field.get_parameter(name).view(-1)[0] = float("nan")

    return action


@pytest.mark.parametrize("step", [7, 8], ids=["between evaluations", "just before one"])
@pytest.mark.parametrize("name", ["motion.matrices", "volume.network.0.weight"])
def test_a_non_finite_loss_rolls_back_lowers_the_rate_and_goes_on(
    small_store, tiny_config, tmp_path, caplog, name, step
):
    path = tmp_path / "checkpoint.pt"
    run = trainer(small_store, tiny_config, path, steps=24, evaluate_every=8, log_every=1)
    run.on_scalars = at_step(step, poison(run, name))
    with caplog.at_level(logging.WARNING, "omni"):
        run.run()
    assert caplog.text.count("not finite") == 1
    state = load_checkpoint(path)
    assert (state["step"], state["rollbacks"], state["rate"]) == (24, 1, 0.5)
    assert all(torch.isfinite(value).all() for value in state["field"].values())
    assert [entry["step"] for entry in state["history"]] == [8, 16, 24]
    assert state["history"][-1]["mean"] < state["history"][0]["mean"] + 0.1


def test_a_resumed_fit_rolls_back_to_where_an_uninterrupted_one_does(
    small_store, tiny_config, tmp_path
):
    """Not to the checkpoint it continued from, which may be spoilt already."""
    settings = dict(steps=20, evaluate_every=8, log_every=1)
    whole = trainer(small_store, tiny_config, tmp_path / "whole.pt", **settings)
    whole.on_scalars = at_step(13, poison(whole, "motion.matrices"))
    whole.run()
    first = trainer(small_store, tiny_config, tmp_path / "parts.pt", **settings)

    def spoil_and_stop():
        poison(first, "motion.matrices")()
        os.kill(os.getpid(), signal.SIGTERM)

    first.on_scalars = at_step(13, spoil_and_stop)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    trainer(small_store, tiny_config, tmp_path / "parts.pt", **settings).run()
    expected, parts = (load_checkpoint(tmp_path / f"{n}.pt") for n in ("whole", "parts"))
    assert parts["rollbacks"] == 1 and differences(parts, expected) == []


def test_a_gradient_that_is_not_finite_never_reaches_the_parameters(
    small_store, tiny_config, tmp_path, caplog
):
    """Also where the loss and the gradients of the couplings are finite."""
    run = trainer(small_store, tiny_config, tmp_path / "c.pt", steps=6, evaluate_every=3)
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 3 else gradient

    run.field.volume.network[2].bias.register_hook(spoil)
    with caplog.at_level(logging.WARNING, "omni"):
        run.run()
    assert "not finite at step 2:" in caplog.text and run.rollbacks == 1 and run.step == 6


@pytest.mark.parametrize("name", ["motion.matrices", "volume.network.2.bias"])
def test_a_parameter_that_is_not_finite_at_the_end_is_not_the_result(
    small_store, tiny_config, tmp_path, name
):
    """Not even one that the held-out error does not depend on."""
    run = trainer(small_store, tiny_config, tmp_path / "c.pt", steps=8, log_every=1)
    run.on_scalars = at_step(8, poison(run, name))
    run.run()
    assert run.step == 8 and run.rollbacks == 1
    assert all(torch.isfinite(p).all() for p in run.field.parameters())
    assert [entry["step"] for entry in run.history] == [8]


def test_a_fit_that_never_becomes_finite_ends(small_store, tiny_config, tmp_path):
    run = trainer(small_store, tiny_config, tmp_path / "c.pt", steps=30, log_every=1)
    run.on_scalars = lambda step, values: poison(run, "motion.matrices")()
    run.run()
    assert run.finished and run.rollbacks == MAX_ROLLBACKS + 1
    assert all(torch.isfinite(p).all() for p in run.field.parameters())


def test_patience_stops_a_fit_that_no_longer_improves(small_store, tiny_config, tmp_path):
    still = dict(lr_mapping=0.0, lr_code=0.0, lr_canonical=0.0, lr_surface=0.0, lr_motion=0.0)
    run = trainer(
        small_store, tiny_config, tmp_path / "c.pt", evaluate_every=5, patience=2, **still
    )
    run.run()
    assert run.step == 15, "the first evaluation and two that are no better"


def test_the_paper_s_losses_and_code_train_too(small_store, tmp_path):
    from omni.config import load_config

    changes = [
        "model.hidden=8",
        "model.canonical_hidden=8",
        "model.code_dim=8",
        "sampling.points=8",
    ]
    config = load_config(
        "paper", [*changes, "render.samples=4", "optim.steps=4", "optim.log_every=1"]
    )
    seen = []
    run = Trainer(small_store, config, tmp_path / "c.pt", CPU, lambda s, v: seen.append(v))
    run.run()
    assert {"loss/flow_difference", "loss/photometric_difference"} <= seen[0].keys()
    assert run.rollbacks == 0 and not {"loss/surface", "loss/constancy"} & seen[0].keys()


def test_pictures_place_points_more_exactly_than_drifting_flow(
    write_store, small_config, scene, tmp_path
):
    """Every flow is off by .1 pixel per frame, consistently, so that no cycle shows it."""
    frames = np.stack([scene.frame(t) for t in range(scene.num_frames)])
    pairs = [tuple(map(int, pair)) for pair in schedule(scene.num_frames, "log", 4)]
    drift = np.array([0.1, -0.1], np.float32)
    flows = {(i, j): scene.flow(i, j) + (j - i) * drift for i, j in pairs}
    store = write_store(tmp_path, frames, pairs, flows)
    queries = grid_queries(store.video_size, 0, 6)
    xy, times = queries[:, :0:-1] / 2, np.arange(scene.num_frames)
    truth = np.stack([scene.track(xy, 0, t) for t in times], 1)
    seen = inside(truth, scene.size).all(1)  # the square hides background: the median forgives it
    medians = []
    for weight in (0, 4):
        loss = replace(small_config.loss, constancy=Term(weight, 0.2, 0.3))
        run = trainer(store, replace(small_config, loss=loss), tmp_path / f"{weight}.pt")
        run.run()
        said = Reader(store, run.field.eval(), 512).follow(queries, times).xy
        medians.append(np.median(np.linalg.norm(said - truth, axis=-1)[seen][:, -1]))
    assert medians[0] > 0.4 and medians[1] < 0.6 * medians[0], medians


def test_a_video_of_two_frames_can_be_fitted_and_read(write_store, tiny_config, scene, tmp_path):
    pairs = [(0, 1), (1, 0)]
    frames = np.stack([scene.frame(t) for t in range(2)])
    store = write_store(tmp_path, frames, pairs, {pair: scene.flow(*pair) for pair in pairs})
    run = trainer(store, tiny_config, tmp_path / "c.pt", steps=3)
    run.run()
    tracks = Reader(store, run.field, 64).tracks([[0, 10, 10], [1, 20, 30]])
    assert run.rollbacks == 0 and np.isfinite(tracks.tracks).all()
