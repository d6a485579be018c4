import logging
import os
import signal
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from fits import CPU, at_step, differences, trainer

from omni.config import Term
from omni.field.checkpoint import load_checkpoint, save_checkpoint
from omni.field.held_out import LARGEST_IN_FRONT
from omni.field.initialisation import surface_depth
from omni.field.trainer import MAX_ROLLBACKS, fit_key
from omni.maths.coords import grid_queries, inside
from omni.run import make_trainer
from omni.system.signals import Interrupted
from omni.tracking.readout import Reader
from preprocess.flow.pairs import schedule


@pytest.fixture(scope="module")
def uninterrupted(small_store, tiny_config, tmp_path_factory):
    """The state after 20 steps without a break."""
    path = tmp_path_factory.mktemp("uninterrupted") / "checkpoint.pt"
    run = trainer(small_store, tiny_config, path, steps=20, evaluate_every=8, log_every=1)
    run.run()
    return load_checkpoint(path)


def test_fitting_lowers_the_loss_and_the_held_out_error(fitted):
    """The background is explained from the start; the square is what is left to fit."""
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
    """Moving surfaces are initialised near; here they are not, and every rate is zero."""

    def opposite(store, motion, cells):
        return 2 - surface_depth(store, motion, cells)

    monkeypatch.setattr("omni.field.trainer.surface_depth", opposite)
    still = dict(lr_mapping=0.0, lr_surface=0.0, lr_motion=0.0, lr_code=0.0)
    settings = dict(steps=20, evaluate_every=4, patience=0, log_every=1, **still)
    path, other = tmp_path / "checkpoint.pt", tmp_path / "other.pt"
    run = trainer(small_store, small_config, path, **settings)
    assert run.evaluate()["in_front"] > LARGEST_IN_FRONT
    run.run()
    assert run.restarts == 1 and "starting the fit anew" in caplog.text
    assert run.history[-1]["in_front"] < LARGEST_IN_FRONT / 2
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
    run.on_images = lambda trainer: pytest.fail("the fit continued")

    def interrupted_save(path, state):
        if state["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, state)

    monkeypatch.setattr("omni.field.trainer.save_checkpoint", interrupted_save)
    with pytest.raises(Interrupted):
        run.run()
    state = load_checkpoint(path)
    assert state["step"] == 3 and state["finished"]


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
def test_a_non_finite_loss_rolls_back_lowers_the_rate_and_continues(
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
    """Not to the checkpoint it continued from, which may not be finite itself."""
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
    run = make_trainer(small_store, config, tmp_path / "c.pt", CPU)
    run.on_scalars = lambda step, values: seen.append(values)
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
        estimate = Reader(store, run.field.eval(), 512).follow(queries, times).xy
        medians.append(np.median(np.linalg.norm(estimate - truth, axis=-1)[seen][:, -1]))
    assert medians[0] > 0.4 and medians[1] < 0.6 * medians[0], medians


def test_a_video_of_two_frames_can_be_fitted_and_read(write_store, tiny_config, scene, tmp_path):
    pairs = [(0, 1), (1, 0)]
    frames = np.stack([scene.frame(t) for t in range(2)])
    store = write_store(tmp_path, frames, pairs, {pair: scene.flow(*pair) for pair in pairs})
    run = trainer(store, tiny_config, tmp_path / "c.pt", steps=3)
    run.run()
    tracks = Reader(store, run.field, 64).tracks([[0, 10, 10], [1, 20, 30]])
    assert run.rollbacks == 0 and np.isfinite(tracks.tracks).all()
