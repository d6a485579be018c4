"""Files that a crash leaves whole, and reading files that are not trusted."""

import errno
import json
import os
import tempfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from omni.errors import OmniError
from omni.system.memory import require_memory

__all__ = [
    "check_archive",
    "crc32_of",
    "make_folder",
    "read_json",
    "refuse_folder",
    "sync_folder",
    "unwritable",
    "write_atomic",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_JSON = 256 << 20
_BLOCK = 1 << 22


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, also after a crash.

    Raises:
        OmniError: the folder is read-only, missing or full; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # whatever it is: nothing is written through a link
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder where missing, and see that files can be written into it.

    Raises:
        OmniError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OmniError(
            f"cannot write into {folder} ({error.strerror}): choose another folder with -o"
        ) from None


def refuse_folder(path: Path) -> None:
    """Check that a path can be that of a result, before the result is computed.

    Raises:
        OmniError: `path` is a folder.
    """
    if path.is_dir():
        raise OmniError(f"{path} is a folder: name a file in it with -o")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power loss, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unwritable(path: Path, error: OSError) -> OmniError:
    """The one clear sentence for a file that the system does not let us write."""
    if error.errno in _FULL:
        advice = "free some disk space and run the same command again, it continues"
    else:
        advice = "choose another folder with -o"
    return OmniError(f"cannot write {path} ({error.strerror}): {advice}")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing, damaged, or no regular file (a pipe)."""
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError):
        return None


def crc32_of(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def check_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip file whose unpacked members, all together, fit in half of the memory.

    A member never unpacks to more than the size in the directory of the archive, so that the
    directory alone bounds what reading can take, whatever the members' own headers declare.

    Raises:
        OmniError: they do not fit.
        zipfile.BadZipFile, OSError, ValueError: no zip file.
    """
    archive = zipfile.ZipFile(path)
    try:
        total = sum(member.file_size for member in archive.infolist())
        require_memory(2 * total, f"{path}, unpacked,", "use a smaller file, or more memory")
    except BaseException:
        archive.close()
        raise
    return archive
