"""A run folder made by an older version (commit 10ef6e7) is opened, read out and resumed.

`tests/data/run_of_10ef6e7.tar.xz` holds a run of six frames of 48 x 64 pixels whose fit was
stopped at step 31 of 60, and the tracks that the older version gave before the fit and after it.
Chains are the same but for the order in which processors sum. The read-out of a fit has changed
since: by what the field predicts to be visible.
"""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import omni
from omni.field import load_checkpoint
from omni.store import Store
from omni.tracking import Reader, Tracks

ARCHIVE = Path(__file__).resolve().parents[1] / "data" / "run_of_10ef6e7.tar.xz"
SAME, SIMILAR = 0.02, 0.2
"""Pixels by which chains may differ, and answers of the fit: a point moves by several in this clip.
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def run(older, tmp_path):
    return shutil.copytree(older / "run_folder", tmp_path / "run")


def assert_same(tracks, path):
    expected = Tracks.load(path)
    np.testing.assert_allclose(tracks.tracks, expected.tracks, atol=SAME)
    np.testing.assert_allclose(tracks.sigma, expected.sigma, rtol=0.05, atol=0.01)
    np.testing.assert_allclose(tracks.visibility, expected.visibility, atol=0.02)


def assert_similar(tracks, path):
    expected = Tracks.load(path)
    np.testing.assert_allclose(tracks.tracks, expected.tracks, atol=SIMILAR)
    assert (tracks.visible == expected.visible).mean() > 0.98
    ratio = np.log(tracks.sigma / expected.sigma)
    assert np.quantile(np.abs(ratio), 0.9) < 0.2


def test_its_flows_are_read_and_followed(older, run):
    tracks = Reader(Store.open(run), None, 8192).tracks(queries(older))
    assert_same(tracks, older / "chains.npz")


def test_its_fit_continues_where_it_stopped_and_ends_where_the_older_version_ended(
    older, run, caplog
):
    assert load_checkpoint(run / "checkpoint.pt")["step"] == 31
    caplog.set_level("WARNING")
    omni.fit(run)
    assert "anew" not in caplog.text
    state = load_checkpoint(run / "checkpoint.pt")
    assert state["step"] == 60 and [entry["step"] for entry in state["history"]] == [20, 40, 60]
    assert_similar(omni.load(run, "cpu").tracks(queries(older)), older / "tracks.npz")


def test_its_settings_are_read(run):
    config = omni.load_config(str(run / "config.yaml"))
    assert config.optim.steps == 60 and config.model.hidden == 16


def queries(older):
    return Tracks.load(older / "tracks.npz").query_points
