"""Checkpoints of older versions and crafted ones."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from fits import at_step, differences, trainer

from omni.errors import DamagedError
from omni.field.checkpoint import load_checkpoint, save_checkpoint
from omni.system.signals import Interrupted


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


def test_a_checkpoint_with_the_measures_of_older_versions_is_resumed(
    small_store, tiny_config, tmp_path, halfway, caplog
):
    """The share of outliers was called "astray", in the history of the good state as well."""
    older = load_checkpoint(halfway)
    for part in (older, older["good"]):
        assert part["history"]
        for entry in part["history"]:
            entry["astray"] = entry.pop("outliers")
    save_checkpoint(tmp_path / "older.pt", older)
    save_checkpoint(tmp_path / "today.pt", load_checkpoint(halfway))
    results = []
    for name in ("older.pt", "today.pt"):
        run = trainer(small_store, tiny_config, tmp_path / name, steps=6, evaluate_every=2)
        run.run()
        results.append(torch.load(tmp_path / name, weights_only=True))
    assert "anew" not in caplog.text and differences(*results) == []
    for part in (results[0], results[0]["good"]):
        assert all("outliers" in entry and "astray" not in entry for entry in part["history"])


CRAFTED = """
import sys, torch
from omni.field.checkpoint import restore_optimizer
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
    assert codes["unchecked"].returncode < 0, "else this test proves nothing"
