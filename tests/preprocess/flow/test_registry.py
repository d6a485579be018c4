import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from omni.config import FlowConfig
from omni.errors import OmniError
from preprocess.flow.registry import accepts, resolve_provider

REPO = Path(__file__).resolve().parents[3]

PACKAGE = '''
import numpy as np

class Still:
    """Nothing moves: what a flow provider must have, and no more."""

    name, workers, batch = "still-1", 1, 4

    def estimate(self, image1, image2, flow_init=None):
        return np.zeros((*image1.shape[:2], 2), np.float32)

    def estimate_batch(self, pairs):
        return [self.estimate(*pair) for pair in pairs]

def make(config, device):
    return Still()

def fail(config, device):
    raise ValueError("no licence")
'''


@pytest.fixture
def package(tmp_path):
    """An installed package that offers flow providers."""
    (tmp_path / "stillflow.py").write_text(PACKAGE)
    info = tmp_path / "stillflow-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stillflow\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[omni.flow]\nstill = stillflow:make\nbroken = stillflow:fail\n"
    )
    return tmp_path


def test_a_package_offers_a_flow_provider(package, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for t, image in enumerate(np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), np.uint8)):
        cv2.imwrite(str(frames / f"{t}.png"), image)

    def preprocess(provider):
        command = [sys.executable, "-m", "omni.cli", "preprocess", str(frames)]
        command += ["-o", str(tmp_path / provider), "--config", "cpu"]
        command += ["--set", f"flow.provider={provider}"]
        environment = {"PYTHONPATH": f"{package}:{REPO}", "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    made = preprocess("still")
    assert made.returncode == 0, made.stderr
    assert "flow: still-1 (stillflow:make)" in made.stderr
    broken = preprocess("broken")
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
    sentence = "flow provider broken (stillflow:fail) could not be made (ValueError: no licence)"
    assert sentence in broken.stderr
    unknown = preprocess("other")
    assert unknown.returncode == 2
    known = "auto, dis, gmflow, mixed, raft, broken, still"
    assert f"no flow provider 'other': set flow.provider to one of {known}" in unknown.stderr


def test_an_unknown_provider_is_named():
    with pytest.raises(OmniError, match="no flow provider 'nothing'"):
        resolve_provider(FlowConfig("nothing"), "cpu")


def test_finished_flow_of_a_package_is_kept_without_it():
    assert accepts(FlowConfig("still"), "still-1") and accepts(FlowConfig("still"), "still")
    assert not accepts(FlowConfig("still"), "stillness-1")
    assert not accepts(FlowConfig("dis"), "still-1") and not accepts(FlowConfig("auto"), "still-1")
