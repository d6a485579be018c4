"""The ablation from a clip to a table, on one that takes seconds."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from omni.synthetic import make_clip

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_variant_is_fitted_and_scored(tmp_path, monkeypatch, capsys):
    make_clip("demo", 6, (48, 64)).save_clip(tmp_path / "tiny.npz", points=24)
    settings = "optim.steps=3 optim.evaluate_every=3 model.hidden=8 sampling.pairs=4 threads=1"
    settings += " flow.workers=1 device=cpu"
    out = tmp_path / "ablation.json"
    monkeypatch.syspath_prepend(str(FOLDER))
    command = [
        "ablation.py",
        "--data",
        str(tmp_path / "tiny.npz"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    command += [f"--set={setting}" for setting in settings.split()]
    monkeypatch.setattr(sys, "argv", [*command, "-o", str(out)])
    runpy.run_path(str(FOLDER / "ablation.py"), run_name="__main__")
    rows = {row["method"]: row for row in json.loads(out.read_text())["results"]}
    assert len(rows) == 10 and all(0 < row["delta_avg"] <= 1 for row in rows.values())
    assert "| mean | free-form |" in capsys.readouterr().out
    assert rows["field alone"]["delta_avg"] != rows["chains alone"]["delta_avg"]


@pytest.mark.slow
def test_time_to_accuracy_counts_and_compares(tmp_path, monkeypatch):
    make_clip("demo", 5, (48, 64)).save_clip(tmp_path / "tiny.npz", points=12)
    out = tmp_path / "time.json"
    monkeypatch.syspath_prepend(str(FOLDER))
    command = ["time_to_accuracy.py", str(tmp_path / "tiny.npz"), "--runs", str(tmp_path / "runs")]
    command += ["--minutes", "0.02", "--points", "2", "--threads", "1", "--set=flow.workers=1"]
    monkeypatch.setattr(sys, "argv", [*command, "-o", str(out)])
    runpy.run_path(str(FOLDER / "time_to_accuracy.py"), run_name="__main__")
    record = json.loads(out.read_text())
    assert record["flops_ratio"] > 20 and record["paper"]["step"] >= 1
    assert record["ours"][-1]["delta_avg"] > 0
