"""Damaged, newer and crafted files, and files or answers larger than the memory."""

import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import damage
import fuzz
import input_readers
import kills
import numpy as np
import pytest
import readers
import torch
from PIL import Image

from omni.config import load_config
from omni.errors import DamagedError, OmniError
from omni.evaluation.truth import load_prediction, load_truth
from omni.field.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint
from omni.run import make_trainer
from omni.run.stages import default_folder
from omni.store import Store
from omni.system import lock, memory
from omni.tracking.readout import Reader
from omni.tracking.tracks import Tracks, read_arrays
from omni.video import decoding
from omni.video.images import list_images, read_image
from omni.video.masks import load_masks
from omni.video.source import open_video
from omni.video.writing import write_video

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["frames", "flow", "evidence"])
def test_one_flipped_bit_of_the_store_is_found_when_it_is_opened(small_store, tmp_path, name):
    run = shutil.copytree(small_store.run, tmp_path / "run")
    damage.flip(run / "store" / f"{name}.npy", -5)
    with pytest.raises(DamagedError, match=rf"{name}\.npy is missing or damaged"):
        Store.open(run)


def test_one_changed_digit_of_the_manifest_is_found(small_store, tmp_path):
    run = shutil.copytree(small_store.run, tmp_path / "run")
    text = (run / "manifest.json").read_text()
    assert '"fps": 25.0' in text
    (run / "manifest.json").write_text(text.replace('"fps": 25.0', '"fps": 26.0'))
    with pytest.raises(DamagedError, match="manifest.json is damaged"):
        Store.open(run)


def test_an_item_that_did_not_reach_the_disk_is_written_again(tmp_path):
    """After a power loss the note that an item is done may have survived the item."""

    def attempt(items, stop):
        with Store(tmp_path).stage("a", "k", {"a": ((4, 3), np.uint8)}, 4) as stage:
            found = stage.done.tolist()
            for item in items:
                stage.arrays["a"][item] = item + 1
                stage.mark(item)
            if stop:
                raise InterruptedError
        return found

    with pytest.raises(InterruptedError):
        attempt([0, 1, 2], stop=True)
    damage.flip(tmp_path / "store" / "a.partial.npy", -8)
    assert attempt([1, 3], stop=False) == [True, False, True, False]
    assert np.load(tmp_path / "store" / "a.npy")[:, 0].tolist() == [1, 2, 3, 4]


def test_a_checkpoint_of_a_newer_format_is_neither_used_nor_replaced(
    small_store, small_config, tmp_path
):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format_version": FORMAT_VERSION + 1, "key": "k"}, path)
    before = path.read_bytes()
    with pytest.raises(OmniError, match="another version"):
        make_trainer(small_store, small_config, path, CPU).run()
    assert path.read_bytes() == before


def test_tracks_of_a_newer_format_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", **input_readers.some_tracks() | {"format_version": np.int64(2)})
    with pytest.raises(OmniError, match="written in format 2"):
        Tracks.load(tmp_path / "t.npz")


def test_one_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"field": {"w": torch.full((1000,), 0.5)}})
    damage.flip(path, path.read_bytes().index(torch.full((8,), 0.5).numpy().tobytes()) + 17)
    assert torch.load(path, weights_only=True)["field"]["w"].unique().numel() == 2, (
        "torch is silent"
    )
    with pytest.raises(DamagedError, match="is damaged"):
        load_checkpoint(path)


def test_a_checkpoint_cannot_ask_for_memory(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format_version": 1, "x": bytearray(3)}, path)
    with pytest.raises(OmniError, match="is damaged"):
        load_checkpoint(path)
    save_checkpoint(path, {"x": torch.zeros(1 << 20)})
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for member in source.infolist():
                target.writestr(member.filename, source.read(member))
    assert packed.stat().st_size < path.stat().st_size / 50
    with pytest.raises(OmniError, match="is damaged"):
        load_checkpoint(packed)


def test_an_npz_that_declares_more_than_it_holds_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "liar.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("tracks.npy", "w") as member:
        facts = {"descr": "<f8", "fortran_order": False, "shape": (1 << 40, 3)}
        np.lib.format.write_array_header_1_0(member, facts)
        member.write(bytes(64))
    with pytest.raises(OmniError, match="promises"):
        read_arrays(path, ())


def test_an_npz_that_unpacks_to_more_than_the_memory_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(200):
            archive.writestr(f"{index}.npy", bytes(10))
    content = bytearray(path.read_bytes())
    at = 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
        at += 46
    path.write_bytes(content)
    with pytest.raises(OmniError, match=r"bomb\.npz, unpacked, needs 1718\.\d GB of memory"):
        read_arrays(path, ())


@pytest.mark.parametrize("name", ["..mp4", "....mp4", "/", "a/../..mp4", ". .mp4", "\x1b]0;x.mp4"])
def test_no_name_of_a_video_leads_out_of_the_folder_of_runs(name):
    chosen = default_folder(name, None)
    assert chosen.resolve().parent == Path("runs").resolve()


def test_what_a_message_repeats_cannot_steer_the_terminal(tmp_path):
    command = [*kills.OMNI, "optimize", "a\x1b]0;gotcha\x07\nsecond line.mp4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "\x1b" not in result.stderr and "gotcha" in result.stderr


def test_an_image_of_a_kind_that_other_programs_open_is_refused_whatever_its_name(tmp_path):
    path = tmp_path / "0.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with Image.open(path) as image:
        assert image.format == "EPS", "Pillow would hand it to Ghostscript"
    with pytest.raises(OmniError, match=r"0\.png cannot be read"):
        read_image(path)


def test_a_pipe_among_the_frames_is_left_out_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert [path.name for path in list_images(tmp_path)] == ["1.png"]


def test_a_config_of_more_than_a_megabyte_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\n" + "#" * (1 << 20))
    with pytest.raises(OmniError, match=r"config\.yaml"):
        load_config(str(path))
    path.write_text("seed: 1\n" + "#" * 1000)
    assert load_config(str(path)).seed == 1


def test_a_playlist_does_not_reach_the_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        for name, content in (
            ("a.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST"),
            ("a.mp4", f"ffconcat version 1.0\nfile {address}\n"),
        ):
            (tmp_path / name).write_text(content)
            with pytest.raises(OmniError, match="video"):
                open_video(tmp_path / name)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_video_whose_frames_do_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    clip = tmp_path / "clip.mp4"
    write_video(clip, iter(np.zeros((3, 64, 64, 3), np.uint8)), 10.0)
    monkeypatch.setattr(decoding, "require_memory", lambda *_: None)
    monkeypatch.setattr(decoding, "available_memory", lambda: 12 * 64 * 64 - 1)
    with pytest.raises(OmniError, match="no frame decodes"):
        open_video(clip)  # as of frames that grow on the way
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: 12 * 64 * 64 - 1)
    with pytest.raises(OmniError, match=r"a frame of .*clip\.mp4 needs"):
        open_video(clip)


def test_masks_and_tracks_that_do_not_fit_in_memory_are_refused(tmp_path, monkeypatch):
    source, masks = open_video(kills.write_clip(tmp_path / "frames")), tmp_path / "masks"
    masks.mkdir()
    for t in range(8):
        Image.new("L", (96, 64)).save(masks / f"{t:03d}.png")
    assert len(load_masks(masks, source)) == 8
    arrays = {"tracks": np.zeros((1000, 1000, 2), np.int8), "visible": np.zeros((1000, 1000), bool)}
    np.savez(tmp_path / "t.npz", **arrays, query_points=np.zeros((1000, 3)), size=[4, 4])
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * 64 * 96 - 1)
    with pytest.raises(OmniError, match="reading the masks in"):
        load_masks(masks, source)
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000_000)
    for read in (Tracks.load, load_truth, load_prediction):
        with pytest.raises(OmniError, match=r"t\.npz, unpacked, needs 0\.0 GB"):
            read(tmp_path / "t.npz")


@pytest.mark.parametrize("name", readers.READERS)
def test_crafted_files_are_read_or_refused_in_one_clear_sentence(name, tmp_path, monkeypatch):
    """20,000 of each: `python tests/faults/fuzz.py`."""
    for constant in ("PATIENCE", "TAKEOVER_DELAY"):
        monkeypatch.setattr(lock, constant, getattr(lock, constant))
    (tmp_path / "work").mkdir()
    result = fuzz.fuzz(name, 30, tmp_path / "work")
    assert result["inputs"] >= 30 and fuzz.failures(result) == 0, result["examples"]


# Memory


LIMITED = """
import resource, sys, logging, torch, numpy as np
from dataclasses import replace
from pathlib import Path
from omni.config import Config, load_config
from omni.maths import grid_queries
from omni.run import make_trainer
from omni.store import Store
from omni.tracking import Reader
logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
store = Store.open(sys.argv[1])
config = load_config("cpu", ["model.hidden=64", "optim.steps=2", "sampling.pairs=%s" % sys.argv[3],
                             "sampling.points=64", "sampling.tracks=0", "model.surface=16"])
trainer = make_trainer(store, config, Path(sys.argv[2]), torch.device("cpu"))
def leave(megabytes):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
leave(700)
trainer.run()
print("pairs", trainer.sampler.batch_pairs, "steps", trainer.step)
reader = Reader(store, trainer.field.eval(), 1 << 12)
points = grid_queries(reader.video_size, 0, 1)
reader.tracks(points[::50])
leave(180)
print("chunk", reader.chunk)
reader.tracks(points, np.linspace(0, 5, 2000))
print("chunk", reader.chunk)
"""


@pytest.mark.slow
def test_without_enough_memory_batches_and_chunks_are_halved_and_the_work_goes_on(
    small_store, tmp_path
):
    """A limit on the address space stands in for a small GPU: the allocation truly fails."""
    command = [sys.executable, "-c", LIMITED, str(small_store.run), str(tmp_path / "c.pt"), "4096"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "out of memory at step 0: continuing with batches of 2048 pairs" in result.stderr
    assert "out of memory: going on in chunks of" in result.stderr
    output = dict(line.rsplit(" ", 1) for line in result.stdout.splitlines())
    assert int(output["chunk"]) < 1 << 12
    assert load_checkpoint(tmp_path / "c.pt")["halvings"] > 0


def test_an_answer_larger_than_the_memory_is_refused_before_it_is_begun(small_store):
    points = np.broadcast_to(np.float32([0, 5, 5]), (1 << 30, 3))
    with pytest.raises(OmniError, match="answering 1073741824 queries at 6 times needs"):
        reader = Reader(small_store, None, 64)
        reader._checked = lambda given: given
        reader.tracks(points)
