import shutil
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest

from omni import run as runs
from omni.checkpoint import save_checkpoint
from omni.cli import main
from omni.coords import grid_queries
from omni.errors import OmniError
from omni.tracks import Tracks


def exact_tracks(scene, size=None, frames=None):
    """What a perfect tracker would write about a grid of points, at the original size or `size`."""
    size = size or (2 * scene.size[0], 2 * scene.size[1])
    scale = size[0] / scene.size[0]
    queries = np.concatenate([grid_queries(scene.size, frame, 2) for frame in (0, 3, 5)])
    tracks, visible = [], []
    for frame in (0, 3, 5):
        xy = queries[queries[:, 0] == frame][:, :0:-1].astype(float)
        path = np.stack([scene.track(xy, frame, t) for t in range(scene.num_frames)], 1)
        square = scene.on_square(xy, frame)[:, None]
        on_square = [scene.on_square(path[:, t], t) for t in range(scene.num_frames)]
        inside = ((path >= 0) & (path <= scene.size[::-1])).all(-1)
        tracks.append(path)
        visible.append(inside & (square | ~np.stack(on_square, 1)))
    tracks, visible = np.concatenate(tracks)[:, :frames], np.concatenate(visible)[:, :frames]
    queries[:, 1:] *= scale
    return Tracks(
        tracks=(scale * tracks).astype(np.float32),
        visible=visible,
        visibility=visible.astype(np.float32),
        sigma=np.full(visible.shape, 0.3 * scale, np.float32),
        query_points=queries,
        size=size,
        fps=25.0,
    )


@pytest.fixture
def run(small_store, tmp_path):
    """A preprocessed run, not yet fitted."""
    return shutil.copytree(small_store.run, tmp_path / "run")


def test_matches_of_the_same_size_are_kept_as_they_are(run, scene, tmp_path):
    tracks = exact_tracks(scene)
    tracks.save(tmp_path / "other.npz")
    runs.import_matches(run, tmp_path / "other.npz")
    assert (run / "matches.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


def test_matches_of_another_size_are_brought_to_the_videos(run, scene, tmp_path):
    exact_tracks(scene, size=(72, 96)).save(tmp_path / "other.npz")
    runs.import_matches(run, tmp_path / "other.npz")
    imported, expected = Tracks.load(run / "matches.npz"), exact_tracks(scene)
    assert imported.size == (48, 64)
    for name in ("tracks", "sigma", "query_points"):
        actual = getattr(imported, name)
        np.testing.assert_allclose(actual, getattr(expected, name), rtol=1e-5, atol=1e-4)


def test_matches_over_other_frames_are_refused_in_one_sentence(run, scene, tmp_path):
    exact_tracks(scene, frames=5).save(tmp_path / "other.npz")
    with pytest.raises(OmniError, match=r"other\.npz .* 5 frames .* 6: track the same frames") as e:
        runs.import_matches(run, tmp_path / "other.npz")
    assert "\n" not in str(e.value) and not (run / "matches.npz").exists()


def test_matches_that_are_no_tracks_are_refused(run, tmp_path):
    (tmp_path / "text.npz").write_text("tracks")
    with pytest.raises(OmniError, match="text.npz"):
        runs.import_matches(run, tmp_path / "text.npz")
    with pytest.raises(OmniError, match="missing.npz"):
        runs.import_matches(run, tmp_path / "missing.npz")


def test_a_folder_in_the_place_of_a_result_is_refused_before_the_work(run, tmp_path):
    """Even before the run is opened: this one is not fitted."""
    for write in (runs.export, lambda run, path: runs.track_baseline(run, path, "mft")):
        with pytest.raises(OmniError, match="is a folder: name a file in it with -o"):
            write(run, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"step": "3"}, {"step": -1}, {"step": 1.0}, {"finished": 1}, {"finished": None}, {"key": []}],
)
def test_a_crafted_checkpoint_says_nothing_about_the_progress(tmp_path, changes):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"key": "k", "step": 3, "finished": True})
    assert runs._progress(path, "k") == (3, True)
    save_checkpoint(path, {"key": "k", "step": 3, "finished": True} | changes)
    assert runs._progress(path, "k") == (0, False)


@pytest.fixture(scope="module")
def astray(scene, write_store, tmp_path_factory):
    """A preprocessed run whose flows point anywhere: no two of them agree."""
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i in range(6) for j in range(6) if abs(i - j) in (1, 2)]
    flows = {pair: rng.uniform(-10, 10, (*scene.size, 2)) for pair in pairs}
    frames = np.stack([scene.frame(t) for t in range(6)])
    return write_store(tmp_path_factory.mktemp("astray"), frames, pairs, flows).run


def fit_error(run, scene, config):
    """Mean distance in original pixels of the fitted field from the truth, where visible."""
    runs.fit(run, config)
    truth = exact_tracks(scene)
    witness = runs.load(run, "cpu").reader.follow(truth.query_points, np.arange(6))
    return np.linalg.norm(2 * witness.xy - truth.tracks, axis=-1)[truth.visible].mean()


@pytest.mark.slow
def test_imported_tracks_lead_a_fit_whose_flows_lead_nowhere(astray, scene, small_config, tmp_path):
    config = replace(
        small_config,
        device="cpu",
        optim=replace(small_config.optim, steps=40, warmup=5),
        sampling=replace(small_config.sampling, tracks=0.9),
    )
    plain, led = (shutil.copytree(astray, tmp_path / name) for name in ("plain", "led"))
    exact_tracks(scene).save(tmp_path / "other.npz")
    runs.import_matches(led, tmp_path / "other.npz")
    without, with_tracks = (fit_error(run, scene, config) for run in (plain, led))
    assert with_tracks < 0.75 * without


def test_a_fit_is_done_anew_with_new_matches_and_left_alone_with_the_same(
    run, scene, small_config, tmp_path
):
    config = replace(small_config, device="cpu", optim=replace(small_config.optim, steps=2))
    checkpoint = run / "checkpoint.pt"

    def fitted_again():
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        runs.fit(run, config)
        return checkpoint.stat().st_mtime_ns != before

    assert fitted_again() and not fitted_again()
    exact_tracks(scene).save(tmp_path / "other.npz")
    runs.import_matches(run, tmp_path / "other.npz")
    assert fitted_again() and not fitted_again()
    runs.import_matches(run, tmp_path / "other.npz")
    assert not fitted_again()


@pytest.fixture(scope="module")
def clip(scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for t in range(scene.num_frames):
        iio.imwrite(folder / f"{t}.png", scene.frame(t).repeat(2, 0).repeat(2, 1))
    return folder


TINY = "optim.steps=2 device=cpu threads=1 flow.provider=dis flow.workers=1".split()
TINY += "output.render_frames=1 output.render_side=16 model.hidden=8".split()


@pytest.mark.slow
def test_optimize_takes_matches_from_the_command_line(clip, scene, tmp_path):
    exact_tracks(scene).save(tmp_path / "other.npz")
    settings = [f"--set={setting}" for setting in TINY]
    matches = ["--matches", str(tmp_path / "other.npz")]
    main(["optimize", str(clip), "-o", str(tmp_path / "run"), *settings, *matches])
    assert (tmp_path / "run" / "matches.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    assert Tracks.load(tmp_path / "run" / "tracks.npz").tracks.shape[1:] == (6, 2)


def test_optimize_with_matches_of_other_frames_says_so_before_the_fit(
    clip, scene, tmp_path, capsys
):
    exact_tracks(scene, frames=4).save(tmp_path / "other.npz")
    settings = [f"--set={setting}" for setting in TINY]
    matches = ["--matches", str(tmp_path / "other.npz")]
    with pytest.raises(SystemExit) as stopped:
        main(["optimize", str(clip), "-o", str(tmp_path / "run"), *settings, *matches])
    assert stopped.value.code == 2
    assert "omni: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
