"""The flow benchmark from sets to table, on sets that take seconds."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from omni.synthetic.clip import make_clip

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "flow.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), "--threads", "1", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Data in the layout of shared/data with known answers, weights, and the benchmark's output."""
    folder = tmp_path_factory.mktemp("flow")
    clips = folder / "synthetic" / "dev"
    clips.mkdir(parents=True)
    (folder / "flow").mkdir()
    make_clip("demo", 3, (64, 80)).save_clip(clips / "demo.npz", points=8)
    noise = np.random.default_rng(0).integers(0, 256, (130, 150, 3), dtype=np.uint8)
    flow = np.broadcast_to(np.float32([-3, -2]), (128, 144, 2))
    inside = np.ones((128, 144), bool)
    inside[:2] = inside[:, :3] = False
    valid = np.random.default_rng(1).random(inside.shape) < 0.5
    pair = {"image1": noise[:128, :144], "image2": noise[2:, 3:147], "flow": flow}
    np.savez(folder / "flow" / "kitti_pair.npz", **pair, valid=valid, inside=inside)
    torch.manual_seed(0)
    save_file(raft_small(weights=None).state_dict(), folder / "mine.safetensors")
    sets = (
        "--data",
        folder,
        "--scenes",
        1,
        "--size",
        48,
        64,
        "--sets",
        "generated",
        "dev",
        "kitti",
    )
    result = run(*sets, "--weights", folder / "mine.safetensors", "-o", folder / "flow.json")
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "flow.json").read_text()), result.stdout, valid.sum()


@pytest.mark.slow
def test_every_provider_is_scored_on_every_set_by_group(measured):
    record, text, _ = measured
    assert set(record) == {"commit", "command", "machine", "providers", "results"}
    assert list(record["results"]) == ["generated", "dev", "kitti"]
    for name, providers in record["results"].items():
        assert [label.split()[0] for label in providers] == ["dis", "raft"]
        for scores in providers.values():
            groups = [group for group in scores if group not in ("sigma", "time")]
            lengths = [scores[g]["points"] for g in groups if g.endswith("px")]
            assert sum(lengths) == scores["all"]["points"], name
            gaps = {g for g in groups if g.startswith("gap")}
            expected = {"generated": {1, 2, 4, 8, 16}, "dev": {1, 2}, "kitti": {1}}[name]
            assert gaps == {f"gap {value}" for value in expected}
            assert 0 <= scores["sigma"]["within_1"] <= scores["sigma"]["within_2"] <= 1
            assert scores["time"]["seconds_per_pair"] > 0
        assert f"| {name} |" in text
    assert "near motion borders" in record["results"]["dev"]["dis"]
    assert "near motion borders" not in record["results"]["kitti"]["dis"]


@pytest.mark.slow
def test_a_known_translation_is_scored_as_known(measured):
    record, _, count = measured
    kitti = record["results"]["kitti"]
    assert kitti["dis"]["all"]["points"] == count
    assert kitti["dis"]["visible"]["median"] < 0.1 and kitti["dis"]["visible"]["outliers_3px"] < 0.1
    untrained = next(scores for label, scores in kitti.items() if label.endswith("/mine"))
    assert untrained["visible"]["mean"] > kitti["dis"]["visible"]["mean"]


@pytest.mark.slow
def test_missing_data_is_one_sentence(tmp_path):
    result = run("--data", tmp_path, "--sets", "dev")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"flow: no clips in {tmp_path}/synthetic/dev" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--scenes", 0), "flow: --scenes must be at least 1"),
        (("--device", "cuda"), "flow: no CUDA device is available"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_options_that_cannot_work_are_one_sentence(options, sentence):
    result = run(*options)
    assert result.returncode == 1 and result.stderr.startswith(sentence)


def test_weights_of_the_same_name_get_labels_of_their_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    flow, paths = runpy.run_path(str(SCRIPT)), []
    for name in ("a/run/w", "b/run/w", "b/run/v"):
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        save_file(raft_small(weights=None).state_dict(), paths[-1])
    options = flow["parse"](["--device", "cpu", "--weights", *map(str, paths)])
    labels = [label for label in flow["find_providers"](options) if label.startswith("raft ")]
    assert labels == [f"raft {paths[0]}", f"raft {paths[1]}", "raft run/v"]
