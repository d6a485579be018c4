"""One process per run folder, whatever happens to processes, clocks and machines."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import kills
import pytest
import torch

from omni.errors import DamagedError, OmniError
from omni.evaluation.truth import load_truth
from omni.run import make_trainer
from omni.store import Store
from omni.system import lock
from omni.system.files import write_atomic
from omni.system.lock import locked, require_lock
from omni.tracking.dense import write_dense
from omni.tracking.readout import Reader
from omni.tracking.tracks import read_arrays


def test_a_second_process_is_refused_and_the_first_one_left_alone(tmp_path):
    script = "import sys, time, omni.system.lock, pathlib\n"
    script += "with omni.system.lock.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); "
    script += "sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen(command, text=True, **pipes)
    assert first.stdout.readline() == "held\n"
    clip = kills.write_clip(tmp_path / "frames", 2)
    result = kills.again(clip, tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"omni: run folder {tmp_path / 'run'} is in use by process {first.pid} on "
        f"{socket.gethostname()}: wait for it, or choose another folder with -o"
    )
    first.kill()
    first.communicate()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / "lock").exists()


def write_lock(run, **changes):
    run.mkdir(exist_ok=True)
    (run / "lock").write_text(json.dumps(lock._ours() | changes))


def foreign(folder):
    """A live process that is not this one holds the folder."""
    write_lock(folder, pid=os.getppid(), started=lock._start_time(os.getppid()))


def test_a_lock_whose_process_number_was_given_to_another_process_is_stale(tmp_path):
    write_lock(tmp_path, pid=1)
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1e99}', None])
def test_a_lock_of_another_machine_is_stale_when_its_heartbeat_stands_still(
    tmp_path, monkeypatch, content
):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    write_lock(tmp_path, host="elsewhere", kernel="another")
    if content is not None:
        (tmp_path / "lock").write_text(content)
    os.utime(tmp_path / "lock", (4e9, 4e9))
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_with_a_heartbeat_is_respected_whatever_its_clock(
    tmp_path, monkeypatch
):
    """A real owner, started where process numbers mean something else to us."""
    monkeypatch.setattr(lock, "PATIENCE", 5.0)
    script = (
        "import sys, omni.system.lock as l, pathlib, time\n"
        "l.BEAT = 0.1\nl._kernel = lambda: 'another'\n"
        "with l.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], text=True, **pipes)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(OmniError, match="is in use by process"):
        with locked(tmp_path):
            pass
    owner.communicate("")


def test_an_owner_whose_lock_was_taken_over_stops(tmp_path):
    script = (
        "import sys, omni.system.lock as l, pathlib, time\nl.BEAT = 0.1\n"
        "with l.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
        "    for _ in range(600): time.sleep(0.05)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    owner = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert owner.stdout.readline() == "held\n"
    write_atomic(tmp_path / "lock", json.dumps(lock._ours()).encode())
    _, errors = owner.communicate(timeout=20)
    assert owner.returncode != 0 and "KeyboardInterrupt" in errors
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_second_thread_is_refused_but_a_block_inside_a_block_is_entered(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def enter():
        with locked(tmp_path):
            pass

    with locked(tmp_path):
        enter()
        assert (tmp_path / "lock").exists()
        with ThreadPoolExecutor(1) as pool, pytest.raises(OmniError, match="in use"):
            pool.submit(enter).result()


def test_an_owner_keeps_its_lock_when_the_machine_is_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with locked(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        os.utime(tmp_path / "lock", (0, 0))
        time.sleep(0.2)
        assert (tmp_path / "lock").stat().st_mtime > 1e6, "the heartbeat continues"
        require_lock(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_an_owner_whose_lock_vanished_stops_and_does_not_make_it_anew(tmp_path, monkeypatch):
    """Taken over, and released again: the other one's files are there."""
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        (tmp_path / "lock").unlink()
        with pytest.raises(OmniError, match="was taken over"):
            require_lock(tmp_path)
        for _ in range(200):
            time.sleep(0.02)
    assert not (tmp_path / "lock").exists()


def test_a_lost_lock_keeps_checkpoint_and_manifest_as_the_new_owner_wrote_them(
    small_store, small_config, tmp_path
):
    run = shutil.copytree(small_store.run, tmp_path / "run")
    trainer = make_trainer(
        Store.open(run), small_config, run / "checkpoint.pt", torch.device("cpu")
    )
    trainer._good = trainer.state()
    with locked(run):
        trainer.save()
        trainer.step = 7
        before = {name: (run / name).read_bytes() for name in ("checkpoint.pt", "manifest.json")}
        foreign(run)
        with pytest.raises(OmniError, match=f"taken over by process {os.getppid()}"):
            trainer.save()
        with pytest.raises(OmniError, match="nothing was written"):
            trainer.store.note(video={})
        assert before == {name: (run / name).read_bytes() for name in before}
    assert (run / "lock").exists(), "it is the other one's"


def test_two_threads_that_find_one_stale_lock_do_not_both_take_it(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(lock, "TAKEOVER_DELAY", 0.05)
    for _ in range(3):
        write_lock(tmp_path, pid=1)
        inside = []

        def enter(inside=inside):
            with locked(tmp_path):
                inside.append(1)
                time.sleep(0.5)

        with ThreadPoolExecutor(2) as pool:
            errors = [task.exception() for task in [pool.submit(enter), pool.submit(enter)]]
        assert len(inside) == 1 and sum(isinstance(error, OmniError) for error in errors) == 1


def test_a_lock_is_released_when_the_heartbeat_cannot_start(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="new thread"):
        broken.setattr(threading.Thread, "start", fail)
        with locked(tmp_path):
            pass
    assert not (tmp_path / "lock").exists()
    with locked(tmp_path):
        pass


def test_only_temporary_files_of_ours_whose_process_is_gone_are_swept(tmp_path):
    (tmp_path / "store").mkdir()
    gone = [".a.npz.4194304.tmp", ".overlay.mp4.4194304.tmp.mp4", "store/.a.json.4194304.tmp"]
    kept = [f".a.{os.getpid()}.tmp", ".notes.tmp", ".tmp", "a.4194304.tmp", ".a.4194304.tmp.txt"]
    for name in gone + kept:
        (tmp_path / name).touch()
    with locked(tmp_path):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, "lock"}


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(small_store, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "lock")
    with locked(tmp_path):
        pass
    run = shutil.copytree(small_store.run, tmp_path / "run")
    (run / "store" / "flow.npy").unlink()
    os.mkfifo(run / "store" / "flow.npy")
    with pytest.raises(DamagedError, match=r"flow\.npy is missing or damaged"):
        Store.open(run)
    (run / "manifest.json").unlink()
    os.mkfifo(run / "manifest.json")
    with pytest.raises(DamagedError, match="manifest.json is damaged"):
        Store(run)
    os.mkfifo(tmp_path / "clip.pkl")
    with pytest.raises(OmniError, match=r"clip\.pkl"):
        load_truth(tmp_path / "clip.pkl")


def test_a_second_dense_export_is_refused_and_the_first_ones_work_left_alone(small_store, tmp_path):
    reader, path = Reader(small_store, None, 4096), tmp_path / "dense.npz"
    folder = tmp_path / ".dense.npz.partial"
    foreign(folder)
    (folder / "tracks.npy").write_bytes(b"rows")
    with pytest.raises(OmniError, match=f"in use by process {os.getppid()}"):
        write_dense(reader, path, 0, 8)
    assert (folder / "tracks.npy").read_bytes() == b"rows" and not path.exists()
    write_lock(folder, pid=1)  # that one was killed
    write_dense(reader, path, 0, 8)
    assert not folder.exists() and read_arrays(path, ("tracks",))["tracks"].ndim == 4
