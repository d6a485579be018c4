"""Benchmarks of the fit from a clip to a table, on one that takes seconds."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from omni.synthetic.clip import make_clip

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SETTINGS = "optim.steps=3 optim.evaluate_every=3 model.hidden=8 sampling.pairs=4 threads=1"
TINY = [f"--set={setting}" for setting in f"{SETTINGS} flow.workers=1 device=cpu".split()]

CLIP = object()
"""The clip's path among arguments."""


@pytest.fixture
def record_of(tmp_path, monkeypatch):
    """Runs a script on a tiny clip that stands where CLIP does; returns its JSON."""

    def call(script, num_frames, size, points, *arguments):
        clip = tmp_path / "tiny.npz"
        make_clip("demo", num_frames, size).save_clip(clip, points=points)
        monkeypatch.syspath_prepend(str(FOLDER))
        out = tmp_path / "record.json"
        command = [script, *(str(clip) if a is CLIP else a for a in arguments)]
        command += ["--runs", str(tmp_path / "runs"), "-o", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return json.loads(out.read_text())

    return call


@pytest.mark.slow
def test_every_variant_is_fitted_and_scored(record_of, capsys):
    record = record_of("ablation.py", 6, (48, 64), 24, "--data", CLIP, *TINY)
    rows = {row["method"]: row for row in record["results"]}
    assert len(rows) == 10 and all(0 < row["delta_avg"] <= 1 for row in rows.values())
    assert "| mean | free-form |" in capsys.readouterr().out
    full = rows["full"]
    assert 0 < full["field delta_avg"] <= 1 and full["field delta_avg"] != full["delta_avg"]
    assert full["hidden"] > 0 and full["psnr"] > 5


@pytest.mark.slow
def test_sharpness_compares_fits_with_and_without_pictures(record_of, capsys):
    settings = [*TINY, "--set=optim.steps=40", "--seeds", "2"]
    record = record_of("sharpness.py", 6, (48, 64), 24, "--data", CLIP, *settings)
    rows = record["results"]
    assert [(row["terms"], row["seed"]) for row in rows] == [
        *(("both", 0), ("both", 1), ("none", 0), ("none", 1))
    ]
    assert all(row["median"] < 24 and 0 < row["within_1px"] < row["delta_avg"] for row in rows)
    psnr = {row["terms"]: row["psnr"] for row in rows}
    assert psnr["both"] > psnr["none"] + 1, "colours are fitted by the photometric terms alone"
    assert "| mean | none |" in capsys.readouterr().out


@pytest.mark.slow
def test_time_to_accuracy_counts_and_compares(record_of):
    settings = ["--minutes", "0.02", "--points", "2", "--threads", "1", "--set=flow.workers=1"]
    record = record_of("time_to_accuracy.py", 5, (48, 64), 12, CLIP, *settings)
    assert record["flops_ratio"] > 20 and record["paper"]["step"] >= 1
    assert record["ours"][-1]["delta_avg"] > 0
