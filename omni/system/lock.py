"""One process per run folder, also where several machines share the disk.

`RUN/lock` names its owner: machine, process and when that process started, and a token that no two
locks share. On the owner's own machine a lock is stale when that process is gone. Seen from any
other machine, or container, it is stale when its heartbeat stands still: the owner touches the file
every `BEAT` seconds, and a waiting process watches for a change during `PATIENCE` seconds of its
own clock. No two clocks are ever compared, so that wrong or changing ones do no harm.

An owner that was suspended for so long that its lock was taken over finds another token, or no
lock: it stops, and `require_lock` keeps it from writing until it does.
"""

import _thread
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omni.errors import OmniError
from omni.system.files import read_json, unwritable

__all__ = ["locked", "require_lock"]

log = logging.getLogger(__name__)

BEAT = 5.0
PATIENCE = 60.0
TAKEOVER_DELAY = 0.2
"""Seconds after taking over a stale lock until it is read again: of two processes that take it over
at once, the last to write owns it."""

_held: dict[Path, tuple[int, dict]] = {}
"""Resolved folder to the thread that holds it and the content of its lock."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder, made where missing; inside another such block of the thread, do nothing.

    Raises:
        OmniError: another process or thread holds it, or it cannot be written.
    """
    folder, thread = run.resolve(), threading.get_ident()
    if folder in _held and _held[folder][0] == thread:
        yield
        return
    path, owner = folder / "lock", _ours()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(path, owner)
    except OSError as error:
        raise unwritable(run, error) from None
    _held[folder] = thread, owner
    stop = threading.Event()
    beat = threading.Thread(target=_keep, args=(path, owner, stop), daemon=True)
    try:
        _sweep(folder)
        beat.start()
        yield
    finally:
        stop.set()
        if beat.is_alive():
            beat.join()
        del _held[folder]
        if read_json(path) == owner:
            with suppress(OSError):
                path.unlink()


def require_lock(run: Path) -> None:
    """Check, before replacing a file of a run folder, that this process still owns it.

    Raises:
        OmniError: this process locked the folder and lost it. Without a lock nothing is checked.
    """
    folder = run.resolve()
    if folder in _held and _is_lost(folder / "lock", _held[folder][1]):
        raise OmniError(
            f"{run} was taken over by {_describe(read_json(folder / 'lock'))} while this process "
            "slept: nothing was written; wait for the other one, then run the same command again"
        )


def _acquire(path: Path, ours: dict[str, Any]) -> None:
    while not _create(path, ours):
        pulse, owner = _pulse(path), read_json(path)
        if not _is_stale(path, owner):
            raise OmniError(
                f"run folder {path.parent} is in use by {_describe(owner)}: wait for it, or choose "
                f"another folder with -o (if it is certainly gone, delete {path})"
            )
        if _pulse(path) != pulse or not os.path.lexists(path):
            continue  # it was released, or another process took it over first
        log.warning("%s was left by %s, which is gone: taking over", path, _describe(owner))
        # One rename, so that the lock is never missing in between.
        temporary = path.with_name(f".lock.{ours['token']}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(ours))
        os.replace(temporary, path)
        time.sleep(TAKEOVER_DELAY)
        if read_json(path) == ours:
            return


def _create(path: Path, ours: dict[str, Any]) -> bool:
    try:
        with open(path, "x") as file:
            try:
                file.write(json.dumps(ours))
                file.flush()
            except OSError:  # a full disk must not leave a lock without an owner
                path.unlink()
                raise
    except FileExistsError:
        return False
    return True


def _ours() -> dict[str, Any]:
    """The content of a new lock of this process."""
    return {
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _is_lost(path: Path, ours: dict[str, Any]) -> bool:
    """Whether a lock is gone or another's; False while the disk cannot be read."""
    try:
        return not path.is_file() or json.loads(path.read_text()) != ours
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True


def _describe(owner: Any) -> str:
    if not isinstance(owner, dict):
        return "an unknown process"
    pid, host = (str(owner.get(key, "?"))[:80] for key in ("pid", "host"))
    return f"process {pid} on {host}"


def _is_stale(path: Path, owner: Any) -> bool:
    if isinstance(owner, dict) and owner.get("kernel") == _kernel() and _kernel():
        pid = owner.get("pid")
        if not isinstance(pid, int) or not _alive(pid):
            return True
        return _start_time(pid) != owner.get("started")
    log.info("%s is held by %s: watching its heartbeat", path, _describe(owner))
    before, deadline = _pulse(path), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE / 20))
        if _pulse(path) != before:
            return False
    return True


def _pulse(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the owner touches, replaces or removes the lock."""
    try:
        # Opening makes network file systems query the server, not their cache; a pipe would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return status.st_mtime_ns, status.st_ino, status.st_size


def _keep(path: Path, ours: dict[str, Any], stop: threading.Event) -> None:
    """Touch the lock until `stop` is set; interrupt the process when another one took it over."""
    while not stop.wait(BEAT):
        if _is_lost(path, ours):
            log.error("%s was taken over by another process: stopping", path)
            _thread.interrupt_main()
            return
        with suppress(OSError):
            os.utime(path)


def _sweep(run: Path) -> None:
    """Remove temporary files of ours that a killed process left."""
    for folder in (run, run / "store"):
        for path in folder.glob(".*"):
            ours = re.fullmatch(r"\..+\.(\d+)\.tmp(\.mp4)?", path.name)
            if ours and not _alive(int(ours[1])):
                with suppress(OSError):
                    path.unlink()


def _alive(pid: Any) -> bool:
    if type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _kernel() -> str:
    """Names the space in which a process number means something: boot and pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """When a process started, in ticks since boot; empty where unknown, or it is a zombie."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""
