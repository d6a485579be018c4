"""Whether a run folder is sound, and videos can be written and read."""

from collections.abc import Iterator
from pathlib import Path

from omni.field import load_checkpoint
from omni.store import Store
from omni.system import Finding, look
from omni.video import check_codecs

__all__ = ["examine"]


def examine(run: Path | None = None) -> Iterator[Finding]:
    """Findings on what needs torch: codecs and, where given, a run folder.

    `omni.system.examine_machine` comes before: it finds out whether torch can be used.
    """
    repair = "pip install --force-reinstall imageio-ffmpeg av, and see that the disk is not full"
    yield look("H.264 is written and read back", check_codecs, repair)
    if run is None:
        return
    complete = "is complete, every checksum matches"
    yield look(f"store of {run} {complete}", lambda: Store.open(run))
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        yield look(f"checkpoint of {run} {complete}", lambda: load_checkpoint(checkpoint))
    else:
        yield Finding("note", f"{run} is not fitted yet", "omni optimize or omni fit does that")
    if (run / "lock").exists():
        advice = "a process works there, or was killed: see the file"
        yield Finding("note", f"{run / 'lock'} exists", advice)
