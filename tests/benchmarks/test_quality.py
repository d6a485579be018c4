"""The quality benchmark from clips to table, on a clip that takes seconds."""

import json
import runpy
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from omni.errors import OmniError
from omni.synthetic.clip import make_clip

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"
FRAMES, SIZE = 5, (48, 64)
SETTINGS = """optim.steps=3 optim.evaluate_every=3 model.hidden=8 sampling.pairs=4 device=cpu
threads=1 flow.provider=dis flow.workers=1""".split()


@pytest.fixture(scope="module")
def quality():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clip("demo", FRAMES, SIZE).save_clip(folder / "tiny.npz", points=12)
    return folder


def arguments(clips, runs, out, *methods):
    settings = [f"--set={setting}" for setting in SETTINGS]
    paths = ["--data", str(clips), "--runs", str(runs), "-o", str(out)]
    return [*paths, "--methods", *methods, *settings]


@pytest.fixture(scope="module")
def measured(quality, clips, tmp_path_factory):
    """Run folders and JSON of one benchmark of three methods."""
    runs = tmp_path_factory.mktemp("runs")
    out = runs / "quality.json"
    quality["main"](arguments(clips, runs, out, "ours", "chain", "mft"))
    return runs, out


@pytest.mark.slow
def test_the_record_holds_scores_settings_code_and_machine(measured):
    record = json.loads(measured[1].read_text())
    assert set(record) == {"commit", "command", "config", "machine", "results"}
    assert record["commit"] and record["config"]["optim"]["steps"] == 3
    assert {"platform", "cores", "gpu", "torch", "opencv", "numpy"} <= set(record["machine"])
    rows = [(row["clip"], row["method"], row["seed"]) for row in record["results"]]
    assert rows == [("tiny", method, 0) for method in ("ours", "chain", "mft")]
    for row in record["results"]:
        assert row["seconds"] > 0 and 0 <= row["AJ"] <= 1 and 0 <= row["OA"] <= 1
    chain = record["results"][1]
    assert chain["delta_avg"] > 0.5, "five frames of a textured scene are easy"


@pytest.mark.slow
def test_the_table_has_a_line_per_clip_and_method_and_their_means(quality, measured):
    rows = json.loads(measured[1].read_text())["results"]
    head, rule, *lines = quality["table"](rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    expected = [[clip, m] for clip in ("tiny", "mean") for m in ("ours", "chain", "mft")]
    assert [row[:2] for row in cells] == expected
    assert all(len(row) == 2 + len(quality["COLUMNS"]) for row in cells)
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    assert [row[2] for row in cells[:3]] == [f"{100 * row['AJ']:.1f}" for row in rows]


@pytest.mark.slow
def test_a_second_run_reuses_the_folders_and_scores_the_same(quality, clips, measured, tmp_path):
    runs, first = measured
    states = {path: path.stat().st_mtime_ns for path in runs.glob("*/checkpoint.pt")}
    assert len(states) == 1
    again = tmp_path / "again.json"
    quality["main"](arguments(clips, runs, again, "ours", "chain"))
    assert states == {path: path.stat().st_mtime_ns for path in runs.glob("*/checkpoint.pt")}
    before, after = (json.loads(path.read_text())["results"] for path in (first, again))
    for old, new in zip(before[:2], after, strict=True):
        assert {k: v for k, v in old.items() if k != "seconds"} == {
            k: v for k, v in new.items() if k != "seconds"
        }


def test_a_folder_of_frames_with_its_truth_is_a_clip(quality, tmp_path):
    clip = make_clip("demo", 2, (32, 48))
    (tmp_path / "walk" / "frames").mkdir(parents=True)
    clip.save_clip(tmp_path / "walk" / "truth.npz", points=4)
    (tmp_path / "notes").mkdir()
    found = quality["find_clips"]([tmp_path], tmp_path / "cache")
    assert [(clip.name, clip.frames) for clip in found] == [("walk", tmp_path / "walk" / "frames")]
    assert found[0].truth.tracks.shape == (4, 2, 2)
    alone = quality["find_clips"]([tmp_path / "walk"], tmp_path / "cache")
    assert [clip.name for clip in alone] == ["walk"]


def test_an_npz_is_unpacked_into_lossless_frames_once(quality, clips, tmp_path):
    (clip,) = quality["find_clips"]([clips / "tiny.npz"], tmp_path)
    names = sorted(clip.frames.iterdir())
    with np.load(clips / "tiny.npz", allow_pickle=False) as data:
        assert np.array_equal(np.stack([iio.imread(name) for name in names]), data["video"])
    stamp = names[0].stat().st_mtime_ns
    quality["find_clips"]([clips], tmp_path)
    assert names[0].stat().st_mtime_ns == stamp


def test_no_clips_are_an_error_that_names_the_folder(quality, tmp_path):
    with pytest.raises(OmniError, match=f"no clips in {tmp_path}"):
        quality["find_clips"]([tmp_path], tmp_path)


def test_a_score_that_is_nowhere_defined_is_a_dash_and_clips_without_it_do_not_count(quality):
    blank = dict.fromkeys(quality["COLUMNS"])
    rows = [
        {**blank, "clip": "a", "method": "mft", "seed": 0, "AJ": 0.5, "OA": None},
        {**blank, "clip": "b", "method": "mft", "seed": 0, "AJ": None, "OA": None},
    ]
    lines = [line.split("|") for line in quality["table"](rows).splitlines()[2:]]
    aj = 3 + quality["COLUMNS"].index("AJ")
    assert [line[aj].strip() for line in lines] == ["50.0", "-", "50.0"]
    assert [line[aj + 2].strip() for line in lines] == ["-", "-", "-"]


def test_seeds_are_averaged_and_their_deviation_is_that_of_the_means_over_clips(quality):
    scores = {("a", 0): 0.4, ("a", 1): 0.6, ("b", 0): 0.8, ("b", 1): 0.6}
    rows = [
        {**dict.fromkeys(quality["COLUMNS"], value), "clip": clip, "method": "ours", "seed": seed}
        for (clip, seed), value in scores.items()
    ]
    column = 3 + quality["COLUMNS"].index("AJ")
    lines = [line.split("|") for line in quality["table"](rows).splitlines()[2:]]
    shown = [line[column].strip() for line in lines]
    assert shown == ["50.0 +- 14.1", "70.0 +- 14.1", "60.0 +- 0.0"]
