"""Benchmarks of time and memory: their tables and records, and one run on a clip of seconds."""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from omni.errors import OmniError
from omni.synthetic import make_clip

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--set=model.hidden=8", "--set=device=cpu", "--set=output.render_frames=2", "--steps=3"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of `benchmarks` as a module; what that changes is undone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setenv("PYTHONPATH", "")
    return importlib.import_module


@pytest.fixture
def measured(tmp_path, script, monkeypatch):
    """Runs speed.py on a tiny clip; returns its JSON."""
    clip = tmp_path / "tiny.npz"
    make_clip("demo", 5, (48, 64)).save_clip(clip, points=24)

    def call(*arguments):
        out = tmp_path / "record.json"
        command = ["speed.py", "--clips", str(clip), "--threads", "1", *TINY, *arguments]
        command += ["--runs", str(tmp_path / "runs"), "-o", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(FOLDER / "speed.py"), run_name="__main__")
        return json.loads(out.read_text())["results"]

    return call


def row(part, stage, frames, **values):
    base = {"part": part, "clip": "a", "threads": 1, "stage": stage, "frames": frames}
    return {**base, "seconds": 1.5, "cpu_seconds": 2.0, "peak_mb": 700, "tree_mb": None, **values}


def test_older_records_stand_beside_the_rows_they_measured(script):
    speed = script("speed")
    rows = [row("stages", "fit", 36), row("dense", "dense", 36, stride=4, pixels=9, times=36)]
    rows[1]["ms_per_pixel"] = 3.0
    old = [row("stages", "fit", 36, seconds=9, cpu_seconds=8), row("stages", "chains", 36)]
    first, second = speed.tables(rows, {"before": old}).split("\n\n")
    assert first.splitlines()[0].endswith("| peak_mb | tree_mb | before |")
    assert first.splitlines()[-1].endswith("| 700 | - | 9 (CPU x 0.25) |")
    assert "| dense | 4 | 9 | 1.5 | 2.0 | 3.0 | 700 | - | - |" in second


def test_growth_is_relative_to_fifty_frames(script):
    speed = script("speed")
    costs = {25: 30.0, 50: 40.0, 200: 50.0}
    rows = [row("growth", "export", t, ms_per_frame=1, cpu_ms_per_frame=costs[t]) for t in costs]
    lines = speed.tables(rows, {}).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["0.75", "1.00", "1.25"]


def test_frames_are_played_forward_and_backward(script, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.png").touch()
    (source / "notes.txt").touch()
    folder = script("speed").played(source, 7, tmp_path / "played")
    links = sorted(folder.iterdir())
    assert "".join(link.resolve().stem for link in links) == "abcbabc"
    with pytest.raises(OmniError, match="no folder of frames"):
        script("speed").played(tmp_path / "none", 7, tmp_path / "other")


def test_a_process_that_fails_or_takes_too_long_is_an_error(script):
    run = script("stages").run_watched
    with pytest.raises(OmniError, match=r"part failed \(3\): the reason"):
        run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], None, "part")
    with pytest.raises(OmniError, match="part: stopped after 0 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], 0.1, "part")


def test_parts_that_fail_or_have_no_time_are_recorded(script, monkeypatch):
    gpu = script("gpu")
    options = SimpleNamespace(minutes=8, device="cpu")
    monkeypatch.setitem(gpu.PARTS, "tests", lambda options, end: 1 // 0)
    failed, skipped = gpu.attempt("tests", options, 9.0), gpu.attempt("tests", options, 0.0)
    assert failed["error"].startswith("ZeroDivisionError") and "8 minutes" in skipped["skipped"]
    results = {"tests": failed, "dense": skipped, "steps": {"default": {"steps_per_second": 2}}}
    assert "| steps | default | steps_per_second 2 |" in gpu.summary(results)


def test_what_reads_and_writes_videos_may_be_missing():
    code = (
        "import sys, uninstalled\n"
        "sys.meta_path.insert(0, uninstalled.Replacements())\n"
        "from omni.video import open_video, write_video\n"
        "try:\n    open_video(uninstalled.__file__)\n"
        "except ImportError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert result.stdout == "av is not installed here\n", result.stderr


@pytest.mark.slow
def test_every_stage_is_measured(measured, capsys):
    rows = {row["stage"]: row for row in measured("--parts", "stages")}
    assert list(rows) == ["preprocess", "chains", "fit", "anchors", "export", "visualize", "total"]
    assert all(row["cpu_seconds"] > 0 and row["peak_mb"] > 100 for row in rows.values())
    assert rows["fit"]["steps"] == 3 and "| tiny | 5 | 1 | total |" in capsys.readouterr().out


@pytest.mark.slow
def test_dense_exports_are_measured_per_pixel(measured):
    rows = {row["stage"]: row for row in measured("--parts", "dense", "--strides", "8")}
    assert rows["dense"]["pixels"] == rows["dense, one time"]["pixels"] == 48
    assert rows["dense"]["times"] == 5 and rows["dense, one time"]["times"] == 1
    assert rows["dense"]["ms_per_pixel"] > 0
