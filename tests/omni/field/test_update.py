import contextlib
import copy
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fits import CPU, trainer

from omni.config import Term
from omni.field.update import CapturedUpdate, term_weights
from omni.run import make_trainer


def arguments(run, step):
    """What one update takes, with a rate and weights that change from step to step."""
    config, batch = run.config, run.sampler.draw(4)
    jitter = torch.rand(*batch.visible.shape, config.render.samples, generator=run.generator) - 0.5
    return batch, jitter, 4, term_weights(config.loss, step / 10), 1 / (1 + step)


class Graph:
    """Stands in for a CUDA graph where there is no GPU: it computes again what was captured."""

    def __init__(self, captured):
        self.captured = captured

    def replay(self):
        captured = self.captured
        inputs = captured._batch, captured._jitter, 4, captured._weights
        results = captured.update.gradients(*inputs)
        captured.update.apply(results[2])
        for name, value in results[0].items():
            captured._results[0][name].copy_(value)
        captured._results[1].copy_(results[1])
        captured._results[2].copy_(results[2])


@pytest.fixture
def pair(small_store, tiny_config, tmp_path, monkeypatch):
    """Two equal trainers, and the update of the second one captured by the stand-in."""
    loss = replace(tiny_config.loss, surface=Term(0.0))  # so that the surface map has no gradient
    config = replace(tiny_config, loss=loss)
    runs = [trainer(small_store, config, tmp_path / f"{i}.pt", steps=10) for i in range(2)]
    captured = CapturedUpdate(runs[1].update)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: Graph(captured),
        "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return *runs, captured


def assert_same_fields(first, second, **tolerance):
    for a, b in zip(first.field.parameters(), second.field.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_captured_updates_are_those_of_the_operations(pair):
    first, second, captured = pair
    for step in range(6):
        expected, found = first.update(*arguments(first, step)), captured(*arguments(second, step))
        assert expected[0].keys() == found[0].keys()
        for name, value in expected[0].items():
            torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
        assert bool(expected[2]) and bool(found[2])
    assert captured._graph is not None and not captured.refused
    states = [run.optimizer.state_dict()["state"] for run in (first, second)]
    assert states[0].keys() == states[1].keys() and all(map(len, states[1].values()))
    assert_same_fields(first, second, rtol=1e-4, atol=1e-5)


def test_a_batch_of_another_shape_is_captured_anew(pair):
    first, second, captured = pair
    for run in (first, second):
        run.sampler.halvings = 0
    captured(*arguments(second, 0))
    graph, shape = captured._graph, captured._batch.visible.shape
    second.sampler.halvings = 1
    captured(*arguments(second, 1))
    assert captured._graph is not graph and captured._batch.visible.shape[0] == shape[0] // 2


def test_what_is_not_finite_changes_nothing(pair):
    first, second, captured = pair
    captured(*arguments(second, 0))
    before = copy.deepcopy(second.field.state_dict())
    moments = copy.deepcopy(second.optimizer.state_dict()["state"])
    batch, *rest = arguments(second, 1)
    for apply in (captured, captured.update):
        finite = apply(replace(batch, sigma=batch.sigma * float("nan")), *rest)[2]
        assert not bool(finite)
        after = second.field.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        for index, entry in second.optimizer.state_dict()["state"].items():
            assert all(torch.equal(entry[name], moments[index][name]) for name in entry)


@pytest.mark.parametrize("fault", ["refuses", "differs"])
def test_without_a_graph_that_agrees_the_operations_are_used(pair, monkeypatch, caplog, fault):
    first, second, captured = pair
    if fault == "refuses":

        def refuse(graph):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "graph", refuse)
    else:
        monkeypatch.setattr(Graph, "replay", lambda graph: None)
    with caplog.at_level(logging.INFO, "omni"):
        for step in range(3):
            first.update(*arguments(first, step))
            captured(*arguments(second, step))
    assert captured.refused and caplog.text.count("CUDA graph") == 1
    assert_same_fields(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_by_a_graph_is_that_by_operations(small_store, tiny_config, tmp_path):
    device, errors = torch.device("cuda"), []
    for captured in (True, False):
        config = replace(tiny_config, optim=replace(tiny_config.optim, steps=60, evaluate_every=60))
        run = make_trainer(small_store, config, tmp_path / f"{captured}.pt", device)
        assert isinstance(run.update, CapturedUpdate)
        run.update.refused = not captured
        run.run()
        assert run.update.refused is not captured
        errors.append(run.history[-1]["mean"])
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_of_one_device_goes_on_on_the_other(small_store, tiny_config, tmp_path):
    path = tmp_path / "c.pt"
    for steps, device in ((4, torch.device("cuda")), (8, CPU)):
        config = replace(tiny_config, optim=replace(tiny_config.optim, steps=8))
        run = make_trainer(small_store, config, path, device)
        run._resume()
        while run.step < steps:
            assert run.train_step() is not None
            run.step += 1
        run.save()
    assert run.step == 8
