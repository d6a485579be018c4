import shutil
from collections import Counter
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import omni
import omni.field.checkpoint
import omni.run.folder
import omni.run.stages
from omni import run as runs
from omni.cli import main
from omni.config import load_config, to_yaml
from omni.errors import OmniError
from omni.field import Trainer
from omni.field.checkpoint import fit_progress, save_checkpoint
from omni.maths.coords import grid_queries
from omni.store import Store
from omni.system import lock
from omni.tracking import Reader
from omni.tracking.tracks import Tracks


def exact_tracks(scene, size=None, frames=None):
    """The output of a perfect tracker for a grid of points, at the original size or `size`."""
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
def test_a_crafted_checkpoint_gives_no_progress(tmp_path, changes):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"key": "k", "step": 3, "finished": True})
    assert fit_progress(path, "k") == (3, True)
    save_checkpoint(path, {"key": "k", "step": 3, "finished": True} | changes)
    assert fit_progress(path, "k") == (0, False)


def test_a_fit_computes_on_one_thread_and_gives_the_others_back(run, small_config, monkeypatch):
    """Threads of small operations wait for each other, most of all on a shared machine."""
    counts, step = [], Trainer.train_step

    def counted(trainer):
        counts.append(torch.get_num_threads())
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", counted)
    config = replace(small_config, device="cpu", optim=replace(small_config.optim, steps=2))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        runs.fit(run, config)
        runs.fit(run, replace(config, seed=1, threads=2))
        assert counts == [1, 1, 2, 2] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contradictory(scene, write_store, tmp_path_factory):
    """A preprocessed run of random flows: no two of them are consistent."""
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i in range(6) for j in range(6) if abs(i - j) in (1, 2)]
    flows = {pair: rng.uniform(-10, 10, (*scene.size, 2)) for pair in pairs}
    frames = np.stack([scene.frame(t) for t in range(6)])
    return write_store(tmp_path_factory.mktemp("contradictory"), frames, pairs, flows).run


def fit_error(run, scene, config):
    """Mean distance in original pixels of the fitted field from the truth, where visible."""
    runs.fit(run, config)
    truth = exact_tracks(scene)
    followed = runs.load(run, "cpu").reader.follow(truth.query_points, np.arange(6))
    return np.linalg.norm(2 * followed.xy - truth.tracks, axis=-1)[truth.visible].mean()


@pytest.mark.slow
def test_imported_tracks_guide_a_fit_whose_flows_are_inconsistent(
    contradictory, scene, small_config, tmp_path
):
    config = replace(
        small_config,
        device="cpu",
        optim=replace(small_config.optim, steps=40, warmup=5),
        sampling=replace(small_config.sampling, tracks=0.9),
    )
    plain, guided = (
        shutil.copytree(contradictory, tmp_path / name) for name in ("plain", "guided")
    )
    exact_tracks(scene).save(tmp_path / "other.npz")
    runs.import_matches(guided, tmp_path / "other.npz")
    without, with_tracks = (fit_error(run, scene, config) for run in (plain, guided))
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


def test_optimize_refuses_matches_of_other_frames_before_the_fit(clip, scene, tmp_path, capsys):
    exact_tracks(scene, frames=4).save(tmp_path / "other.npz")
    settings = [f"--set={setting}" for setting in TINY]
    matches = ["--matches", str(tmp_path / "other.npz")]
    with pytest.raises(SystemExit) as stopped:
        main(["optimize", str(clip), "-o", str(tmp_path / "run"), *settings, *matches])
    assert stopped.value.code == 2
    assert "omni: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def count_calls(monkeypatch, owner, name, calls):
    """Count the calls of a function in `calls`, by its name; it works as before."""
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def optimized(clip, tmp_path_factory):
    """A finished run, and how often it opened what a run consists of."""
    calls = {place: Counter() for place in ("run", "stages", "checkpoint")}
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch, omni.run.folder, "load_config", calls["run"])
        count_calls(patch, omni.run.folder, "choose_device", calls["run"])
        count_calls(patch, omni.run.folder, "load_field", calls["run"])
        count_calls(patch, lock, "_acquire", calls["run"])
        count_calls(patch, Store, "__init__", calls["run"])
        count_calls(patch, omni.run.stages, "load_config", calls["stages"])
        count_calls(patch, omni.field.checkpoint, "parse_config", calls["checkpoint"])
        opened = omni.optimize(clip, tmp_path_factory.mktemp("optimized") / "run", None, TINY)
    return opened, calls


def test_optimize_opens_each_part_of_its_run_once(optimized):
    _, calls = optimized
    once = ("load_config", "choose_device", "_acquire", "__init__")
    assert calls["run"] == dict.fromkeys(once, 1)
    assert not calls["stages"] and not calls["checkpoint"]


def test_optimize_gives_the_run_that_load_gives(optimized):
    opened, _ = optimized
    loaded = omni.load(opened.folder, "cpu")
    assert loaded.config == opened.config and loaded.steps == opened.steps == 2
    queries = opened.queries()
    for tracks in (opened.tracks(queries), loaded.tracks(queries)):
        assert tracks.to_bytes() == (opened.folder / "tracks.npz").read_bytes()
    assert opened.report == loaded.report
    assert not (opened.folder / "lock").exists()


def test_settings_of_the_output_take_effect_in_a_finished_run(optimized, clip, tmp_path):
    run = shutil.copytree(optimized[0].folder, tmp_path / "run")
    fitted = (run / "checkpoint.pt").read_bytes()
    again = omni.optimize(clip, run, None, ["output.grid=24", "output.frame=2"])
    assert (run / "checkpoint.pt").read_bytes() == fitted
    queries = grid_queries(again.store.video_size, 2, 24)
    for name in ("chains.npz", "tracks.npz"):
        np.testing.assert_array_equal(Tracks.load(run / name).query_points, queries)
    assert load_config(str(run / "config.yaml")).output.grid == 24
    np.testing.assert_array_equal(omni.load(run, "cpu").at(1.5).query_points, queries)


def contents(folder):
    """Every file of a folder with its bytes and time of change, but the report of the stages."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_export_reads_the_run_and_changes_nothing_in_it(optimized, tmp_path):
    run = shutil.copytree(optimized[0].folder, tmp_path / "run")
    before = contents(run)
    runs.export(run, tmp_path / "out.npz")
    assert contents(run) == before
    assert (tmp_path / "out.npz").read_bytes() == (run / "tracks.npz").read_bytes()


def test_a_run_whose_report_cannot_be_written_is_exported(optimized, tmp_path, caplog):
    """As in a folder that may only be read."""
    run = shutil.copytree(optimized[0].folder, tmp_path / "run")
    (run / "report.json").unlink()
    (run / "report.json").mkdir()
    runs.export(run, tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_bytes() == (run / "tracks.npz").read_bytes()
    assert "cannot write" in caplog.text and "report.json" in caplog.text


def test_a_device_that_is_not_here_does_not_keep_a_run_from_being_read(optimized, tmp_path):
    run = shutil.copytree(optimized[0].folder, tmp_path / "run")
    settings = replace(optimized[0].config, device="nowhere")
    (run / "config.yaml").write_text(to_yaml(settings))
    omni.load(run, "cpu")
    runs.track_baseline(run, tmp_path / "mft.npz", "mft")
    with pytest.raises(OmniError, match="'nowhere' is not one of"):
        runs.fit(run)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        *((command, "missing") for command in ("visualize", "export", "fit", "baseline")),
        *((command, "unfitted") for command in ("visualize", "export")),
    ],
)
def test_a_command_on_a_run_it_cannot_use_prints_one_sentence_and_makes_no_folder(
    command, fault, run, tmp_path, capsys
):
    folder = run if fault == "unfitted" else tmp_path / "missing"
    before = sorted(tmp_path.rglob("*"))
    out = ["-o", str(tmp_path / "new" / "out.npz")] if command in ("export", "baseline") else []
    with pytest.raises(SystemExit) as stopped:
        main([command, str(folder), *out])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("omni: ") and "omni optimize" in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def fitted_run(run, small_config):
    runs.fit(run, replace(small_config, optim=replace(small_config.optim, steps=30)))
    return runs.load(run, "cpu")


def test_anchors_are_answered_once_until_what_they_come_from_changes(
    fitted_run, scene, tmp_path, monkeypatch
):
    answered, select = [], Reader.select
    monkeypatch.setattr(
        Reader, "select", lambda self, q: answered.append(q[0, 0]) or select(self, q)
    )
    first = fitted_run.dense(0)
    assert first.tracks.shape == (48 * 64, 6, 2)
    again = runs.load(fitted_run.folder, "cpu").dense(0)
    np.testing.assert_array_equal(again.tracks, first.tracks)
    assert answered == [0]
    fitted_run.dense(3)
    assert answered == [0, 3]
    exact_tracks(scene).save(tmp_path / "matches.npz")
    runs.import_matches(fitted_run, tmp_path / "matches.npz")
    fitted_run.dense(0)
    assert answered == [0, 3, 0]


def test_a_run_that_cannot_be_written_is_answered_all_the_same(fitted_run, caplog):
    (fitted_run.folder / "anchors").write_text("in the way")
    assert fitted_run.dense(0).tracks.shape == (48 * 64, 6, 2)
    assert "anchors" in caplog.text


def test_pixels_are_answered_from_coarse_to_fine_only_where_that_is_faster(fitted_run):
    assert fitted_run.pixel_reader(0, 10**6) is not fitted_run.reader
    assert fitted_run.pixel_reader(0, 10**6, exact=True) is fitted_run.reader
    assert fitted_run.pixel_reader(0, 20) is fitted_run.reader, "fewer than anchors"
    assert fitted_run.pixel_reader(0.5, 10**6) is fitted_run.reader, "between frames"
