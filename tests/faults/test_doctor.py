"""`omni doctor`: what it finds, and that it continues whatever is broken."""

import os
import shutil
import subprocess
import sys

import damage
import kills

from omni.run import examine
from omni.system import doctor


def test_doctor_finds_a_second_opencv_and_a_damaged_run(small_store, tmp_path):
    run = shutil.copytree(small_store.run, tmp_path / "run")
    damage.flip(run / "store" / "flow.npy", -5)
    extra = tmp_path / "site" / "opencv_python_headless-9.9.dist-info"
    extra.mkdir(parents=True)
    (extra / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: opencv-python-headless\nVersion: 9.9"
    )
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*kills.OMNI, "doctor", str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert result.returncode == 1, result.stderr
    assert "OpenCV is installed 2 times" in result.stdout
    assert "pip uninstall -y" in result.stdout
    assert "flow.npy is missing or damaged" in result.stdout
    assert "H.264 is written and read back" in result.stdout


def test_doctor_lists_the_weights_in_the_cache_of_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    assert doctor._weights().what == f"no RAFT weights in {cache}"
    cache.mkdir(parents=True)
    (cache / "raft_small_C_T_V2-01064c6d.pth").touch()
    assert doctor._weights().what == "RAFT weights: raft_small_C_T_V2-01064c6d.pth"


def test_doctor_takes_a_run_that_is_not_fitted_yet_as_no_problem(small_store):
    codecs, store, checkpoint = examine(small_store.run)
    assert [finding.status for finding in (codecs, store, checkpoint)] == ["ok", "ok", "note"]
    assert "is not fitted yet" in checkpoint.what


def test_doctor_says_that_torch_is_broken_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = list(doctor.examine_machine(tmp_path))
    broken = [f for f in findings if f.what.startswith("torch does not import")]
    assert [f.status for f in broken] == ["problem"] and len(findings) >= 4


def test_doctor_is_content_with_this_machine():
    result = subprocess.run([*kills.OMNI, "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for what in ("torch", "OpenCV", "H.264", "of memory available", "GB free at"):
        assert what in result.stdout
