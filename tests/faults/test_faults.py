"""What docs/reliability.md promises, against the real command, real signals and real disks."""

import importlib
import importlib.machinery
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import fuzz
import kills
import numpy as np
import pytest
import torch
from PIL import Image

from omni import decoding, doctor, lock, memory
from omni.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint
from omni.config import load_config
from omni.dense import write_dense
from omni.errors import DamagedError, OmniError
from omni.files import write_atomic
from omni.images import list_images, read_image
from omni.lock import locked, require_lock
from omni.readout import Reader
from omni.run import default_run
from omni.signals import Interrupted, raise_interrupted, stop_signals
from omni.store import Store
from omni.tracks import Tracks, read_arrays
from omni.trainer import Trainer
from omni.truth import load_prediction, load_truth
from omni.video import load_masks, open_video, write_video

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A clip, an uninterrupted run of it, and how long its stages took."""
    folder = tmp_path_factory.mktemp("reference")
    clip = kills.write_clip(folder / "frames")
    seconds = kills.time_stages(clip, folder / "run")
    return clip, folder / "run", seconds


def again(clip, run, *more):
    command = [*kills.command(clip, run), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def same_tracks(run, other):
    return (run / "tracks.npz").read_bytes() == (other / "tracks.npz").read_bytes()


# Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"),
    [("flow", signal.SIGUSR1), ("fit", signal.SIGKILL), ("fit", signal.SIGTERM)],
)
def test_a_killed_run_continues_to_the_same_bytes(reference, tmp_path, stage, number):
    """All stages and signals, 30 times: `python tests/faults/kills.py`."""
    clip, uninterrupted, seconds = reference
    run = tmp_path / "run"
    killed, said = kills.kill_once(clip, run, stage, 0.3 * seconds[stage], number)
    assert killed and not (run / "tracks.npz").exists()
    if number != signal.SIGKILL:
        name = signal.Signals(number).name
        last = f"omni: stopped by {name}; run the same command again to continue"
        assert said.strip().splitlines()[-1] == last
        assert not (run / "lock").exists()
    assert again(clip, run).returncode == 0
    assert same_tracks(run, uninterrupted)


@pytest.mark.slow
def test_a_run_that_was_killed_moved_redated_and_damaged_continues_to_the_same_bytes(
    reference, tmp_path
):
    """Clocks that jumped, another place for run and video, one flipped bit in the flows."""
    clip, uninterrupted, seconds = reference
    assert kills.kill_once(clip, tmp_path / "a", "fit", 0.5 * seconds["fit"], signal.SIGKILL)[0]
    video, run = tmp_path / "elsewhere" / "clip", tmp_path / "elsewhere" / "run"
    shutil.copytree(clip, video)
    (tmp_path / "a").rename(run)
    for index, path in enumerate(sorted(run.rglob("*"))):
        os.utime(path, (0, 0) if index % 2 else (4e9, 4e9))
    flow = run / "store" / "flow.npy"
    content = bytearray(flow.read_bytes())
    content[len(content) // 2] ^= 1
    flow.write_bytes(content)
    result = again(video, run)
    assert result.returncode == 0, result.stderr
    assert "flow in" in result.stderr and "is damaged: computing it again" in result.stderr
    assert same_tracks(run, uninterrupted)


@pytest.mark.slow
def test_manifest_checkpoint_and_report_cut_short_are_made_again(reference, tmp_path):
    clip, uninterrupted, _ = reference
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("manifest.json", "checkpoint.pt", "report.json", "tracks.npz"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
    result = again(clip, run)
    assert result.returncode == 0, result.stderr
    for name in ("manifest.json", "checkpoint.pt"):
        assert f"{name} is damaged" in result.stderr
    assert same_tracks(run, uninterrupted)
    assert len(json.loads((run / "report.json").read_text())["stages"]) == 5


@pytest.mark.slow
def test_a_run_goes_on_when_its_video_is_gone_after_preprocessing(reference, tmp_path):
    clip, uninterrupted, seconds = reference
    video, run = shutil.copytree(clip, tmp_path / clip.name), tmp_path / "run"
    assert kills.kill_once(video, run, "fit", 0.2 * seconds["fit"], signal.SIGKILL)[0]
    shutil.rmtree(video)
    result = again(video, run, "--set=data.resolution=32")
    assert result.returncode == 2 and "does not exist" in result.stderr
    result = again(video, run)
    assert result.returncode == 0 and "is gone: going on" in result.stderr
    assert same_tracks(run, uninterrupted)


def test_a_video_that_goes_while_it_is_read_is_one_clear_error(tmp_path):
    clip = kills.write_clip(tmp_path / "frames")
    frames = iter(open_video(clip))
    next(frames)
    (clip / "004.png").unlink()
    with pytest.raises(OmniError, match=r"004\.png cannot be read"):
        list(frames)


# One process per run folder


def test_a_second_process_is_refused_and_the_first_one_left_alone(tmp_path):
    script = "import sys, time, omni.lock, pathlib\n"
    script += "with omni.lock.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); "
    script += "sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen(command, text=True, **pipes)
    assert first.stdout.readline() == "held\n"
    clip = kills.write_clip(tmp_path / "frames", 2)
    result = again(clip, tmp_path / "run")
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
        "import sys, omni.lock as l, pathlib, time\nl.BEAT = 0.1\nl._kernel = lambda: 'another'\n"
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
        "import sys, omni.lock as l, pathlib, time\nl.BEAT = 0.1\n"
        "with l.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
        "    for _ in range(600): time.sleep(0.05)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    owner = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert owner.stdout.readline() == "held\n"
    write_atomic(tmp_path / "lock", json.dumps(lock._ours()).encode())
    _, said = owner.communicate(timeout=20)
    assert owner.returncode != 0 and "KeyboardInterrupt" in said
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_second_thread_is_refused_but_a_block_inside_a_block_goes_on(tmp_path):
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
        assert (tmp_path / "lock").stat().st_mtime > 1e6, "the heartbeat goes on"
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
    trainer = Trainer(Store.open(run), small_config, run / "checkpoint.pt", CPU)
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

    monkeypatch.setattr(lock, "SETTLE", 0.05)
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


# Signals


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_announces_the_end_stops_with_one_sentence(name):
    script = (
        "import os, signal, omni.cli, omni.doctor\n"
        f"omni.doctor.examine = lambda run: os.kill(os.getpid(), signal.{name})\n"
        "omni.cli.main(['doctor'])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr == f"omni: stopped by {name}; run the same command again to continue\n"
    assert result.returncode == 128 + getattr(signal, name)


def test_under_nohup_a_lost_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(raise_interrupted):
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


# Disks


def in_a_mount(script, *arguments):
    """Run a shell script where it may mount; skips where the system does not allow that."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs unshare -rm")
    command = ["unshare", "-rm", "bash", "-euc", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_full_disk_stops_with_one_sentence_and_more_room_continues(reference, tmp_path):
    """Too small for the store; then for the checkpoint; then large enough."""
    clip, uninterrupted, _ = reference
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir(), out.mkdir()
    omni_command = " ".join(f"'{part}'" for part in kills.command(clip, disk / "run"))
    result = in_a_mount(
        f"mount -t tmpfs -o size=600k tmpfs {disk}\n"
        f"set +e; {omni_command} 2>{out}/first; echo $? >{out}/first.code; set -e\n"
        f"mount -o remount,size=1700k {disk}\n"
        f"set +e; {omni_command} 2>{out}/second; echo $? >{out}/second.code; set -e\n"
        f"mount -o remount,size=50m {disk}\n"
        f"{omni_command} 2>{out}/third\n"
        f"cp {disk}/run/tracks.npz {out}"
    )
    assert result.returncode == 0, result.stderr
    for attempt, says in (("first", "are free there"), ("second", "No space left on device")):
        lines = (out / attempt).read_text().strip().splitlines()
        assert (out / f"{attempt}.code").read_text() == "2\n", lines
        assert lines[-1].startswith("omni: ") and says in lines[-1]
        assert "Traceback" not in "".join(lines)
    assert same_tracks(out, uninterrupted)


@pytest.mark.slow
def test_a_read_only_run_can_be_read_but_not_continued(reference, tmp_path):
    _, uninterrupted, _ = reference
    run, out = tmp_path / "run", tmp_path / "out.npz"
    run.mkdir()
    result = in_a_mount(
        f"mount --bind -o ro {uninterrupted} {run}; mount -o remount,ro,bind {run}\n"
        f"{sys.executable} -m omni.cli export {run} -o {out} --grid 32\n"
        f"{sys.executable} -c 'import omni; omni.load(\"{run}\").tracks([[0, 5, 5]])'\n"
        f"{sys.executable} -m omni.cli visualize {run}"
    )
    assert result.returncode == 2, result.stderr
    assert len(Tracks.load(out).tracks) == 6
    last = result.stderr.strip().splitlines()[-1]
    assert (
        last == f"omni: cannot write {run} (Read-only file system): choose another folder with -o"
    )


def test_a_stage_takes_its_space_when_it_starts(tmp_path):
    """A memory map that meets a full disk later would kill the process."""
    result = in_a_mount(
        "mount -t tmpfs -o size=1m tmpfs $1; cd $2; $3 -c '"
        "import sys, numpy as np; from omni.store import Store; from omni.errors import OmniError\n"
        "try:\n"
        '    with Store(sys.argv[1]).stage("a", "k", {"a": ((2000, 1000), np.uint8)}, 2): pass\n'
        "except OmniError as error: print(error)' $1",
        tmp_path,
        REPO,
        sys.executable,
    )
    assert "cannot write" in result.stdout and "No space left" in result.stdout, result.stderr


# Damaged, newer, crafted


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["frames", "flow", "evidence"])
def test_one_flipped_bit_of_the_store_is_found_when_it_is_opened(small_store, tmp_path, name):
    run = shutil.copytree(small_store.run, tmp_path / "run")
    flip(run / "store" / f"{name}.npy", -5)
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
    flip(tmp_path / "store" / "a.partial.npy", -8)
    assert attempt([1, 3], stop=False) == [True, False, True, False]
    assert np.load(tmp_path / "store" / "a.npy")[:, 0].tolist() == [1, 2, 3, 4]


def test_a_checkpoint_of_a_newer_format_is_neither_used_nor_replaced(
    small_store, small_config, tmp_path
):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format_version": FORMAT_VERSION + 1, "key": "k"}, path)
    before = path.read_bytes()
    with pytest.raises(OmniError, match="another version"):
        Trainer(small_store, small_config, path, CPU).run()
    assert path.read_bytes() == before


def test_tracks_of_a_newer_format_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", **fuzz.some_tracks() | {"format_version": np.int64(2)})
    with pytest.raises(OmniError, match="written in format 2"):
        Tracks.load(tmp_path / "t.npz")


def test_one_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"field": {"w": torch.full((1000,), 0.5)}})
    flip(path, path.read_bytes().index(torch.full((8,), 0.5).numpy().tobytes()) + 17)
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


def test_an_npz_that_promises_more_than_it_holds_is_refused_before_it_is_read(tmp_path):
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
    chosen = default_run(name)
    assert chosen.resolve().parent == Path("runs").resolve()


def test_what_a_message_repeats_cannot_steer_the_terminal():
    command = [*kills.OMNI, "optimize", "a\x1b]0;gotcha\x07\nsecond line.mp4"]
    result = subprocess.run(command, capture_output=True, text=True)
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


@pytest.mark.parametrize("name", fuzz.READERS)
def test_crafted_files_are_read_or_refused_in_one_clear_sentence(name, tmp_path, monkeypatch):
    """20,000 of each: `python tests/faults/fuzz.py`."""
    for constant in ("PATIENCE", "SETTLE"):
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
from omni.readout import Reader
from omni.store import Store
from omni.trainer import Trainer
logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
store = Store.open(sys.argv[1])
config = load_config("cpu", ["model.hidden=64", "optim.steps=2", "sampling.pairs=%s" % sys.argv[3],
                             "sampling.points=64", "sampling.tracks=0", "model.surface=16"])
trainer = Trainer(store, config, Path(sys.argv[2]), torch.device("cpu"))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), resource.RLIM_INFINITY))
trainer.run()
print("pairs", trainer.sampler.batch_pairs, "steps", trainer.step)
reader = Reader(store, trainer.field.eval(), 1 << 17)
tracks = reader.dense(0, 1)
points = np.repeat(tracks.query_points, 40, axis=0)
print("chunk", reader.chunk); reader.tracks(points); print("chunk", reader.chunk)
"""


@pytest.mark.slow
def test_without_enough_memory_batches_and_chunks_are_halved_and_the_work_goes_on(
    small_store, tmp_path
):
    """A limit on the address space stands in for a small GPU: the allocation truly fails."""
    command = [sys.executable, "-c", LIMITED, str(small_store.run), str(tmp_path / "c.pt"), "4096"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "out of memory at step 0: going on with batches of 2048 pairs" in result.stderr
    assert "out of memory: going on in chunks of" in result.stderr
    said = dict(line.rsplit(" ", 1) for line in result.stdout.splitlines())
    assert int(said["chunk"]) < 1 << 17
    assert load_checkpoint(tmp_path / "c.pt")["halvings"] > 0


def test_an_answer_larger_than_the_memory_is_refused_before_it_is_begun(small_store):
    points = np.broadcast_to(np.float32([0, 5, 5]), (1 << 30, 3))
    with pytest.raises(OmniError, match="answering 1073741824 queries at 6 times needs"):
        reader = Reader(small_store, None, 64)
        reader._checked = lambda given: given
        reader.tracks(points)


# The machine


def test_doctor_finds_a_second_opencv_and_a_damaged_run(small_store, tmp_path):
    run = shutil.copytree(small_store.run, tmp_path / "run")
    flip(run / "store" / "flow.npy", -5)
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
    assert "H.264 written and read back" in result.stdout


def test_doctor_knows_weights_that_are_part_of_the_build(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    package = importlib.machinery.ModuleSpec("preprocess", None, origin=str(tmp_path / "__init__"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert "no RAFT weights" in doctor._weights().what
    (tmp_path / "raft_small.safetensors").touch()
    assert doctor._weights().what == "RAFT weights: raft_small.safetensors"


def test_doctor_takes_a_run_that_is_not_fitted_yet_as_no_problem(small_store):
    findings = list(doctor._run_folder(small_store.run))
    assert [finding.verdict for finding in findings] == ["note", "ok"]
    assert "is not fitted yet" in findings[0].what


def test_doctor_says_that_torch_is_broken_and_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = list(doctor.examine())
    broken = [f for f in findings if f.what.startswith("torch does not import")]
    assert [f.verdict for f in broken] == ["problem"] and len(findings) >= 5


def test_doctor_is_content_with_this_machine():
    result = subprocess.run([*kills.OMNI, "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for what in ("torch", "OpenCV", "H.264", "of memory available", "GB free at"):
        assert what in result.stdout
