"""One process per run folder, also where several machines share the disk.

`RUN/lock` names its owner: machine, process and when that process started. On the owner's own
machine a lock is stale when that process is gone. Seen from any other machine, or container, it is
stale when its heartbeat stands still: the owner touches the file every `BEAT` seconds, and who
waits watches for a change during `PATIENCE` seconds of its own clock. No two clocks are ever
compared, so that wrong or changing ones do no harm.
"""

import _thread
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omni.errors import OmniError
from omni.files import read_json, unwritable

__all__ = ["locked"]

log = logging.getLogger(__name__)

BEAT = 5.0
PATIENCE = 60.0
SETTLE = 0.2
"""Seconds after taking over a stale lock until it is read again: of two who do, the last wins."""

_held: dict[Path, int] = {}
"""Resolved folder to the thread that holds it."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder, made where missing; a block inside another one just goes on.

    Raises:
        OmniError: another process or thread holds it, or it cannot be written.
    """
    folder, thread = run.resolve(), threading.get_ident()
    if _held.get(folder) == thread:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(run)
    except OSError as error:
        raise unwritable(run, error) from None
    _held[folder] = thread
    _sweep(run)
    stop = threading.Event()
    beat = threading.Thread(target=_keep, args=(run / "lock", stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        del _held[folder]
        if _is_ours(read_json(run / "lock")):
            with suppress(OSError):
                (run / "lock").unlink()


def _acquire(run: Path) -> None:
    path = run / "lock"
    while not _create(path):
        owner = read_json(path)
        if not _is_stale(path, owner):
            raise OmniError(
                f"run folder {run} is in use by {_describe(owner)}: wait for it, or choose "
                f"another folder with -o (if it is certainly gone, delete {path})"
            )
        log.warning("%s was left by %s, which is gone: taking over", path, _describe(owner))
        # One rename, so that the lock is never missing in between.
        temporary = path.with_name(f".lock.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(_ours()))
        os.replace(temporary, path)
        time.sleep(SETTLE)
        if _is_ours(read_json(path)):
            return


def _create(path: Path) -> bool:
    try:
        with open(path, "x") as file:
            file.write(json.dumps(_ours()))
    except FileExistsError:
        return False
    return True


def _ours() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def _is_ours(owner: Any) -> bool:
    return owner == _ours()


def _describe(owner: Any) -> str:
    if not isinstance(owner, dict):
        return "an unknown process"
    pid, host = (str(owner.get(key, "?"))[:80] for key in ("pid", "host"))
    return f"process {pid} on {host}"


def _is_stale(path: Path, owner: Any) -> bool:
    if isinstance(owner, dict) and owner.get("kernel") == _kernel() and _kernel():
        pid = owner.get("pid")
        alive = isinstance(pid, int) and 0 < pid < 1 << 31 and _alive(pid)
        return not alive or _start_time(pid) != owner.get("started")
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
        # Opening makes network file systems ask the server, not their cache.
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _keep(path: Path, stop: threading.Event) -> None:
    """Touch the lock until told to stop; interrupt the process when another one took it over."""
    while not stop.wait(BEAT):
        with suppress(OSError):
            if not path.exists():
                _create(path)
            elif _is_ours(read_json(path)):
                os.utime(path)
            elif read_json(path) is not None:
                log.error("%s was taken over by another process: stopping", path)
                _thread.interrupt_main()
                return


def _sweep(run: Path) -> None:
    """Remove temporary files that a killed process left; nobody else can be writing here."""
    for path in run.glob(".*.tmp*"):
        with suppress(OSError):
            path.unlink()


def _alive(pid: int) -> bool:
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
