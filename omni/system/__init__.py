"""The machine under a run: files that survive a crash, the lock, memory, threads, stop signals.

May import `omni.errors`. It loads neither torch nor OpenCV before a function needs them, so that
`omni --help` answers at once.
"""

from omni.system.device import choose_device
from omni.system.doctor import Finding, examine_machine, look
from omni.system.files import (
    check_archive,
    crc32_of,
    make_folder,
    read_json,
    refuse_folder,
    sync_folder,
    unwritable,
    write_atomic,
)
from omni.system.lock import locked, require_lock
from omni.system.memory import available_memory, out_of_memory, require_memory
from omni.system.report import read_report, timed
from omni.system.schema import Shorthand, apply_settings, digest, parse_yaml, shorten, to_dict
from omni.system.signals import Interrupted, raise_interrupted, stop_signals
from omni.system.stage import Stage
from omni.system.threads import run_in_slices, single_threaded_opencv, torch_threads

__all__ = [
    "Finding",
    "Interrupted",
    "Shorthand",
    "Stage",
    "apply_settings",
    "available_memory",
    "check_archive",
    "choose_device",
    "crc32_of",
    "digest",
    "examine_machine",
    "locked",
    "look",
    "make_folder",
    "out_of_memory",
    "parse_yaml",
    "raise_interrupted",
    "read_json",
    "read_report",
    "refuse_folder",
    "require_lock",
    "require_memory",
    "run_in_slices",
    "shorten",
    "single_threaded_opencv",
    "stop_signals",
    "sync_folder",
    "timed",
    "to_dict",
    "torch_threads",
    "unwritable",
    "write_atomic",
]
