"""The product as a user runs it: real subprocesses, real files, real signals."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import omni

OMNI = [sys.executable, "-m", "omni.cli"]
TINY = [
    f"--set={setting}"
    for setting in (
        "optim.steps=240",
        "optim.evaluate_every=60",
        "optim.log_every=20",
        "optim.image_every=100",
        "sampling.pairs=16",
        "model.hidden=32",
        "threads=1",
        "flow.workers=1",
        "output.grid=8",
        "output.render_side=32",
        "output.render_frames=4",
    )
]


def command(*arguments, **options):
    return subprocess.run(
        [*OMNI, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Eight frames of a texture that moves 2 px right and 1 px down per frame, as PNG files."""
    folder = tmp_path_factory.mktemp("clip") / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((128, 96), Image.Resampling.BICUBIC))
    for t in range(8):
        x, y = 24 - 2 * t, 12 - t
        iio.imwrite(folder / f"{t:03d}.png", texture[y : y + 64, x : x + 96])
    return folder


@pytest.fixture(scope="module")
def finished(clip, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "clip"
    result = command("optimize", clip, "-o", run, "--config", "cpu", *TINY)
    assert result.returncode == 0, result.stderr
    return run


@pytest.mark.slow
def test_optimize_leaves_tracks_that_follow_the_known_motion(finished):
    tracks = omni.Tracks.load(finished / "tracks.npz")
    moved = tracks.tracks[:, 4] - tracks.tracks[:, 0]
    inner = (tracks.query_points[:, 2] < 80) & (tracks.query_points[:, 1] < 52)
    assert np.median(np.abs(moved[inner] - [8, 4])) < 0.25
    assert tracks.visible[inner, 4].mean() > 0.8
    assert tracks.tracks.shape == (96, 8, 2)
    for name in ("overlay.mp4", "color.mp4", "depth.mp4"):
        assert len(iio.imread(finished / name, plugin="pyav")) >= 4
    report = json.loads((finished / "report.json").read_text())
    assert set(report["stages"]) == {
        *("preprocess", "chains", "fit", "anchors", "export", "visualize")
    }
    held_out = report["stages"]["fit"]["held_out"]
    assert held_out[-1]["median"] < 0.5


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_a_moved_one_can_still_be_read(finished, clip):
    before = (finished / "checkpoint.pt").stat().st_mtime_ns
    assert command("optimize", clip, "-o", finished, *TINY).returncode == 0
    assert (finished / "checkpoint.pt").stat().st_mtime_ns == before
    moved = finished.with_name("moved elsewhere")
    finished.rename(moved)
    try:
        run = omni.load(moved)
        between = run.at(2.5, np.array([[0.0, 32.0, 40.0]]))
        assert np.abs(between.tracks[0, 0] - [45, 34.5]).max() < 0.5
        assert run.dense(3, stride=16).tracks.shape == (24, 8, 2)
    finally:
        moved.rename(finished)


@pytest.mark.slow
def test_fitted_float32_field_inverts_far_below_a_ten_thousandth_of_a_pixel(finished):
    import torch

    field = omni.load(finished).reader.field
    points = torch.rand(8, 500, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points[..., 2] += 1
    times = torch.arange(8.0)
    assert next(field.parameters()).dtype == torch.float32
    with torch.no_grad():
        back = field.from_canonical(times, field.to_canonical(times, points))
    pixels = (back - points)[..., :2].abs() * torch.tensor([48.0, 32.0])
    assert pixels.max() < 1e-7


@pytest.mark.slow
def test_export_writes_queries_grids_dense_and_fractional_times(finished, tmp_path):
    queries = tmp_path / "q.npz"
    np.savez(queries, query_points=np.array([[7, 50.0, 60.0], [3.5, 20.0, 30.0]]))
    out = tmp_path / "out.npz"
    result = command("export", finished, "-o", out, "--queries", queries)
    assert result.returncode == 0, result.stderr
    tracks = omni.Tracks.load(out)
    assert np.abs(tracks.tracks[0, 5] - [56, 48]).max() < 0.5
    assert command("export", finished, "-o", out, "--dense", "--grid", 2).returncode == 0
    with np.load(out, allow_pickle=False) as data:
        assert data["tracks"].shape == (32, 48, 8, 2)
        assert data["query_points"].shape == (32, 48, 3)
    result = command("export", finished, "-o", out, "--times", 0.5, 1.25)
    assert result.returncode == 0, result.stderr
    assert omni.Tracks.load(out).tracks.shape == (96, 2, 2)


@pytest.mark.slow
def test_board_serves_curves_pictures_and_an_animation(finished):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([*OMNI, "board", str(finished), "--port", str(port)])
    try:
        scalars = fetch(port, "scalars/tags")
        names = {name for run in json.loads(scalars).values() for name in run}
        expected = {"loss/flow", "loss/photometric", "held_out/median", "lr/mapping"}
        assert expected <= names
        images = json.loads(fetch(port, "images/tags"))["."]
        assert {"field/reconstruction", "field/depth", "field/flow"} <= set(images)
        query = urllib.parse.urlencode({"run": ".", "tag": "tracks/animation", "sample": 0})
        listing = json.loads(fetch(port, f"images/images?{query}"))
        key = urllib.parse.urlencode({"blob_key": listing[0]["query"].split("blob_key=")[1]})
        animation = Image.open(BytesIO(fetch(port, f"images/individualImage?{key}")))
        assert animation.n_frames > 1
        texts = json.loads(fetch(port, "text/tags"))["."]
        assert any("config" in name for name in texts)
    finally:
        server.terminate()
        server.wait(20)


def fetch(port, what):
    """GET from TensorBoard's HTTP interface, waiting until the server is up."""
    url = f"http://127.0.0.1:{port}/data/plugin/{what}"
    for _ in range(150):
        try:
            data = urllib.request.urlopen(url, timeout=10).read()
            if data.strip() != b"{}":
                return data
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"no response from {url}")


def text_named_mp4(folder):
    path = folder / "video.mp4"
    path.write_text("not a video")
    return [path]


def empty_folder(folder):
    (folder / "empty").mkdir()
    return [folder / "empty"]


def one_frame(folder):
    (folder / "one").mkdir()
    iio.imwrite(folder / "one" / "0.png", np.zeros((32, 32, 3), np.uint8))
    return [folder / "one"]


def two_sizes(folder):
    (folder / "two").mkdir()
    for i, side in enumerate((32, 48)):
        iio.imwrite(folder / "two" / f"{i}.png", np.zeros((side, 32, 3), np.uint8))
    return [folder / "two"]


def mask_of_another_size(folder):
    (folder / "f").mkdir()
    for i in range(3):
        iio.imwrite(folder / "f" / f"{i}.png", np.zeros((32, 32, 3), np.uint8))
    iio.imwrite(folder / "mask.png", np.zeros((16, 16), np.uint8))
    return [folder / "f", "--masks", folder / "mask.png"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: [folder / "missing.mp4"], "missing.mp4"),
        (text_named_mp4, "video.mp4"),
        (empty_folder, "empty"),
        (one_frame, "fewer than 2 frames"),
        (two_sizes, "48"),
        (mask_of_another_size, "mask.png"),
        (lambda folder: [folder, "--set=optim.step=3"], "optim.steps"),
        (lambda folder: [folder, "--config", "cqu"], "cpu"),
        (lambda folder: [*two_sizes(folder), "-o", "/proc/omni"], "/proc/omni"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(make, reason, tmp_path):
    arguments = make(tmp_path)
    if "-o" not in arguments:
        arguments += ["-o", tmp_path / "run"]
    result = command("optimize", *arguments)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("omni: ")
    assert reason in lines[0]
    assert not (tmp_path / "run" / "store").exists()


def test_help_is_quick_to_load_and_needs_no_torch():
    script = "import sys, omni.cli\nassert 'torch' not in sys.modules and 'cv2' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    result = command("--help")
    assert result.returncode == 0 and "optimize" in result.stdout


@pytest.fixture(scope="module", autouse=True)
def _outside_the_repository(tmp_path_factory):
    """Commands run with default output folders must not write into the tree."""
    before = set(Path().iterdir())
    yield
    assert set(Path().iterdir()) - before <= {Path(".pytest_cache"), Path(".hypothesis")}
