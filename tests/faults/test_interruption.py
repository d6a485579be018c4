"""Kills, signals and full disks, as docs/reliability.md states: real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import damage
import kills
import pytest

from omni.errors import OmniError
from omni.system.signals import Interrupted, raise_interrupted, stop_signals
from omni.tracking.tracks import Tracks
from omni.video.source import open_video

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A clip, an uninterrupted run of it, and how long its stages took."""
    folder = tmp_path_factory.mktemp("reference")
    clip = kills.write_clip(folder / "frames")
    seconds = kills.time_stages(clip, folder / "run")
    return clip, folder / "run", seconds


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
    killed, output = kills.kill_once(clip, run, stage, 0.3 * seconds[stage], number)
    assert killed and not (run / "tracks.npz").exists()
    if number != signal.SIGKILL:
        name = signal.Signals(number).name
        last = f"omni: stopped by {name}; run the same command again to continue"
        assert output.strip().splitlines()[-1] == last
        assert not (run / "lock").exists()
    assert kills.again(clip, run).returncode == 0
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
    damage.flip(flow, flow.stat().st_size // 2)
    result = kills.again(video, run)
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
    result = kills.again(clip, run)
    assert result.returncode == 0, result.stderr
    for name in ("manifest.json", "checkpoint.pt"):
        assert f"{name} is damaged" in result.stderr
    assert same_tracks(run, uninterrupted)
    assert len(json.loads((run / "report.json").read_text())["stages"]) == 6


@pytest.mark.slow
def test_a_run_goes_on_when_its_video_is_gone_after_preprocessing(reference, tmp_path):
    clip, uninterrupted, seconds = reference
    video, run = shutil.copytree(clip, tmp_path / clip.name), tmp_path / "run"
    assert kills.kill_once(video, run, "fit", 0.2 * seconds["fit"], signal.SIGKILL)[0]
    shutil.rmtree(video)
    result = kills.again(video, run, "--set=data.resolution=32")
    assert result.returncode == 2 and "does not exist" in result.stderr
    result = kills.again(video, run)
    assert result.returncode == 0 and "is gone: continuing" in result.stderr
    assert same_tracks(run, uninterrupted)


def test_a_video_that_goes_while_it_is_read_is_one_clear_error(tmp_path):
    clip = kills.write_clip(tmp_path / "frames")
    frames = iter(open_video(clip))
    next(frames)
    (clip / "004.png").unlink()
    with pytest.raises(OmniError, match=r"004\.png cannot be read"):
        list(frames)


# Signals


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_announces_the_end_stops_with_one_sentence(name):
    script = (
        "import os, signal, omni.cli\n"
        f"omni.cli.examine_machine = lambda run: os.kill(os.getpid(), signal.{name})\n"
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
    for attempt, reason in (("first", "are free there"), ("second", "No space left on device")):
        lines = (out / attempt).read_text().strip().splitlines()
        assert (out / f"{attempt}.code").read_text() == "2\n", lines
        assert lines[-1].startswith("omni: ") and reason in lines[-1]
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
