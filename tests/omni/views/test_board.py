"""Everything is read from the real TensorBoard server, over HTTP."""

import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from omni.config import Config, to_yaml
from omni.errors import OmniError
from omni.views.board import Board, serve, table_markdown, yaml_markdown

SERVE = "import sys; from omni.views import serve; serve(sys.argv[1], port=0)"


def moving_square() -> np.ndarray:
    frames = np.zeros((6, 40, 60, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[10:20, 5 * t : 5 * t + 10] = (255, 80, 0)
    return frames


def write_run(run: Path) -> None:
    with Board(run / "tensorboard") as board:
        for step in range(10):
            board.scalars({"loss/flow": 1 / (step + 1), "loss/total": step}, step)
        for step in range(15):
            board.image("tracks/depth", np.full((30, 40, 3), step, np.uint8), step)
        board.animation("tracks/animation", moving_square(), 9)
        board.text("run/config", yaml_markdown(to_yaml(Config())))
        board.text("run/summary", table_markdown({"error, px": 1.23456, "a|b": 3}), 9)
        vertices = np.random.default_rng(0).normal(size=(25_000, 3))
        vertices[0] = np.nan
        board.points("tracks3d/points", vertices, np.zeros((25_000, 3), np.uint8), 9)


def resume_run(run: Path) -> None:
    with Board(run / "tensorboard", purge_step=5) as board:
        for step in range(5, 8):
            board.scalars({"loss/flow": -1.0, "loss/total": -1.0}, step)
    with Board(run / "tensorboard") as board:
        board.scalars({"loss/flow": -2.0, "loss/total": -2.0}, 8)


class Server:
    """A running `serve` and its HTTP interface."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def get(self, path: str, **query) -> tuple[bytes, str]:
        address = f"{self.url}/data/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as reply:
            return reply.read(), reply.headers.get_content_type()

    def json(self, path: str, **query):
        return json.loads(self.get(path, **query)[0])

    def wait(self) -> None:
        """Until every run and tag written has been read: the last one written is the mesh."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            tags = self.json("plugin/mesh/tags") if self.up() else {}
            if sum(bool(names) for names in tags.values()) == 2:
                return
            time.sleep(0.1)
        raise AssertionError("TensorBoard did not show both runs within 30 s")

    def up(self) -> bool:
        try:
            return "scalars" in self.json("plugins_listing")
        except urllib.error.URLError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """One server over two runs, the second of which was stopped and resumed."""
    runs = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        write_run(runs / name)
    resume_run(runs / "second")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(runs)], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        server = Server(next(word for word in line.split() if word.startswith("http")))
        server.wait()
        yield server
    finally:
        process.kill()
        process.wait()


RUN, RESUMED = "first/tensorboard", "second/tensorboard"


def test_every_tab_lists_what_was_written(server):
    listing = server.json("plugins_listing")
    assert all(listing[tab]["enabled"] for tab in ("scalars", "images", "text", "mesh"))
    assert set(server.json("plugin/scalars/tags")[RUN]) == {"loss/flow", "loss/total"}
    assert set(server.json("plugin/images/tags")[RUN]) == {"tracks/depth", "tracks/animation"}
    assert len(server.json("plugin/text/tags")[RUN]) == 2
    assert "tracks3d/points" in str(server.json("plugin/mesh/tags")[RUN])


def test_scalars_arrive_with_their_steps(server):
    rows = server.json("plugin/scalars/scalars", run=RUN, tag="loss/flow")
    assert [row[1] for row in rows] == list(range(10))
    np.testing.assert_allclose([row[2] for row in rows], 1 / (np.arange(10) + 1), rtol=1e-6)


EXPECTED = [*((step, step) for step in range(5)), (5, -1.0), (6, -1.0), (7, -1.0), (8, -2.0)]


def test_resumed_run_has_one_curve_without_duplicates(server):
    rows = server.json("plugin/scalars/scalars", run=RESUMED, tag="loss/total")
    assert [(row[1], row[2]) for row in rows] == EXPECTED


def test_resumed_run_has_one_curve_in_the_python_loader_too(tmp_path):
    write_run(tmp_path)
    resume_run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tensors = events.Tensors("loss/total")
    assert [(row.step, row.tensor_proto.float_val[0]) for row in tensors] == EXPECTED


def picture(server, tag: str, row: int) -> tuple[Image.Image, str, int]:
    rows = server.json("plugin/images/images", run=RUN, tag=tag, sample=0)
    key = dict(urllib.parse.parse_qsl(rows[row]["query"]))
    data, kind = server.get("plugin/images/individualImage", **key)
    return Image.open(io.BytesIO(data)), kind, len(rows)


def test_more_than_ten_pictures_of_a_tag_are_kept(server):
    image, kind, count = picture(server, "tracks/depth", 3)
    assert (kind, image.size, count) == ("image/png", (40, 30), 15)
    assert (np.asarray(image) == 3).all()


def test_animation_served_is_an_animation(server):
    image, kind, _ = picture(server, "tracks/animation", 0)
    assert kind == "image/png" and image.n_frames == 6
    image.seek(4)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), moving_square()[4])


def test_config_and_summary_are_rendered_as_markdown(server):
    def text(tag):
        (row,) = server.json("plugin/text/text", run=RUN, tag=f"{tag}/text_summary")
        return row["text"]

    assert "<code" in text("run/config") and "cycle_threshold: 1.5" in text("run/config")
    assert "<td>1.235</td>" in text("run/summary") and "<td>a|b</td>" in text("run/summary")


def test_point_cloud_is_thinned_to_20000(server):
    metadata = server.json("plugin/mesh/meshes", run=RUN, tag="tracks3d/points", sample=0)
    assert {tuple(row["data_shape"]) for row in metadata} == {(1, 20_000, 3)}


def test_folder_without_events_or_without_run_is_an_error(tmp_path):
    with pytest.raises(OmniError, match="no TensorBoard files"):
        serve(tmp_path)
    with pytest.raises(OmniError, match="does not exist"):
        serve(tmp_path / "missing")


def test_port_in_use_is_an_error_naming_the_option(tmp_path):
    Board(tmp_path / "tensorboard").close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OmniError, match="--port"):
            serve(tmp_path, port=taken.getsockname()[1])


def test_unusable_address_is_an_error(tmp_path):
    Board(tmp_path / "tensorboard").close()
    with pytest.raises(OmniError, match="--host"):
        serve(tmp_path, port=70_000)
    with pytest.raises(OmniError, match="--host"):
        serve(tmp_path, port=0, host="203.0.113.1")


def test_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OmniError, match="cannot write"):
        Board(tmp_path / "file" / "tensorboard")
