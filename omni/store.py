"""The on-disk contract between preprocessing and everything after it: the run folder's store.

    RUN/manifest.json          format version, source, one record per finished stage
    RUN/store/frames.npy       (T, h, w, 3) uint8, processing resolution
    RUN/store/masks.npy        (T, h, w) uint8 object labels, 0 background (only with masks)
    RUN/store/flow.npy         (K, h, w, 2) int16, pixels x FLOW_SCALE, source to target
    RUN/store/doubt.npy        (K, h, w) uint8, only from flow providers that judge themselves:
                               sigma and hidden, packed as error and occluded of evidence
    RUN/store/evidence.npy     (K, h, w) uint8, see `pack_evidence`
    RUN/store/landmarks.npy    (P, M, 4) float32, feature matches between key frames

Letters: T frames, K ordered frame pairs, h x w processing size. A stage writes `NAME.partial.npy`
and the checksum of every finished item, so that an interrupted one continues with what is truly on
disk; only a finished one is renamed and entered in the manifest, under a key that hashes its inputs
and settings. Nothing is ever overwritten in place, all paths are relative to the run folder, and
nothing read here is trusted: checksums, shapes and ranges are checked when a store is opened.
"""

import json
import logging
import math
import mmap
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni.errors import DamagedError, OmniError
from omni.files import crc32_of, read_json, sync_folder, unwritable, write_atomic
from omni.lock import require_lock

__all__ = [
    "FLOW_SCALE",
    "FORMAT_VERSION",
    "UNKNOWN",
    "Evidence",
    "Stage",
    "Store",
    "decode_flow",
    "encode_flow",
    "pack_evidence",
    "unpack_evidence",
]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FLOW_SCALE = 32
"""int16 flow is pixels x 32: steps of 1/32 pixel up to 1023 pixels."""

UNKNOWN = 255
"""Mask label of pixels about which the user said nothing."""

_MOST_PIXELS = 1 << 27
"""Of a frame of the video: a grid over more would not fit in memory."""

_LEVELS = 12.0
_ERROR_BITS, _OCCLUDED_BIT, _VALID_BIT = 0x3F, 0x40, 0x80


def encode_flow(flow: np.ndarray) -> np.ndarray:
    """Flow in pixels (float) to int16 fixed point; longer than 1023 pixels saturates."""
    return np.clip(np.rint(flow * FLOW_SCALE), -32767, 32767).astype(np.int16)


def decode_flow(code: np.ndarray) -> np.ndarray:
    """Inverse of `encode_flow`: float32 pixels."""
    return code.astype(np.float32) / FLOW_SCALE


@dataclass(frozen=True)
class Evidence:
    """What the checks say about each pixel of a flow; arrays of one shape.

    error: forward-backward error in pixels (saturates at 9.3).
    occluded: the first cycle fails, the second closes, the target lies inside: the point is
        hidden in the target frame and the flow still plausible (OmniMotion's double cycle).
    valid: the target lies inside the frame, on the same side of every cut, on the same mask label.
    """

    error: np.ndarray
    occluded: np.ndarray
    valid: np.ndarray


def pack_evidence(evidence: Evidence) -> np.ndarray:
    """One byte per pixel: 6 bits of log-quantised error, 1 bit occluded, 1 bit valid.

    `code = round(12 log2(1 + 4 error))`: steps of 0.04 px at 0.5 px, 0.1 px at 1.5 px.
    """
    code = np.rint(_LEVELS * np.log2(1 + 4 * np.maximum(evidence.error, 0)))
    code = np.minimum(np.nan_to_num(code, nan=_ERROR_BITS), _ERROR_BITS).astype(np.uint8)
    return (
        code
        | (evidence.occluded * np.uint8(_OCCLUDED_BIT))
        | (evidence.valid * np.uint8(_VALID_BIT))
    )


def unpack_evidence(code) -> Evidence:
    """Inverse of `pack_evidence`, up to the quantisation of the error. Takes numpy or torch."""
    exponent = (code & _ERROR_BITS) / _LEVELS
    return Evidence(
        error=(2**exponent - 1) / 4,
        occluded=(code & _OCCLUDED_BIT) > 0,
        valid=(code & _VALID_BIT) > 0,
    )


class Stage:
    """An unfinished stage: memory-mapped arrays plus one checksum per finished item.

    A checksum says that an item was written, and whether it reached the disk: after a power loss
    the system may have kept the one and lost the other. Space is taken when the stage starts, since
    a memory map on a full disk kills the process without a word.

    Attributes:
        arrays: name to writable memory map.
        done: (items,) bool, what earlier (interrupted) work already wrote.
    """

    def __init__(self, folder: Path, key: str, arrays: dict[str, tuple], items: int):
        self._folder, self._names = folder, list(arrays)
        state = folder / "stage.partial.json"
        expected = {"key": key, "arrays": _describe(arrays), "items": items}
        if read_json(state) != expected or not self._restore(arrays, items):
            with suppress(FileNotFoundError):
                state.unlink()
            for name, (shape, dtype) in arrays.items():
                _allocate(self._partial(name), dtype, shape)
            self._sums_path.unlink(missing_ok=True)  # it may lead elsewhere
            self._sums_path.write_bytes(bytes(8 * items))
            write_atomic(state, json.dumps(expected).encode())
        self.arrays = {
            name: np.lib.format.open_memmap(self._partial(name), "r+") for name in arrays
        }
        self._sums = np.memmap(self._sums_path, dtype=np.uint64, mode="r+", shape=(items,))
        self.done = self._sums > 0
        for item in np.flatnonzero(self.done):
            self.done[item] = self._sums[item] == self._sum(item)

    @property
    def _sums_path(self) -> Path:
        return self._folder / "stage.done"

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.partial.npy"

    def _restore(self, arrays: dict[str, tuple], items: int) -> bool:
        """Whether the files of an interrupted stage are there, renamed ones brought back."""
        if not _is_own(self._sums_path) or self._sums_path.stat().st_size != 8 * items:
            return False
        for name in arrays:
            final = self._folder / f"{name}.npy"
            if not self._partial(name).is_file() and final.is_file():
                os.replace(final, self._partial(name))
        return all(
            _is_own(self._partial(name))
            and _header(self._partial(name)) == (tuple(shape), np.dtype(dtype))
            for name, (shape, dtype) in arrays.items()
        )

    def _sum(self, item: int) -> int:
        """1 + CRC-32 of an item in every array; 0 says that it is not written."""
        value = 0
        for array in self.arrays.values():
            value = zlib.crc32(np.ascontiguousarray(array[item]), value)
        return 1 + value

    def mark(self, item: int) -> None:
        """Note that `item` is written completely. Call after writing it to every array."""
        self._sums[item] = self._sum(item)
        self.done[item] = True

    def flush(self) -> None:
        """Push everything written so far to disk."""
        for array in self.arrays.values():
            array.flush()
        self._sums.flush()

    def close(self) -> dict[str, dict[str, Any]]:
        """Rename the arrays to their final names; returns size and checksum of each.

        Raises:
            DamagedError: a finished item is not as it was written.
        """
        self.flush()
        for item in np.flatnonzero(self._sums):
            if self._sums[item] != self._sum(item):
                raise DamagedError(
                    f"{self._partial(self._names[0])} was changed while it was written: see who "
                    "else writes there, or check the disk, then run the same command again"
                )
        self.arrays.clear()
        records = {}
        for name in self._names:
            records[f"{name}.npy"] = {
                "bytes": self._partial(name).stat().st_size,
                "crc32": crc32_of(self._partial(name)),
            }
        for name in self._names:
            os.replace(self._partial(name), self._folder / f"{name}.npy")
        sync_folder(self._folder)
        return records

    def forget(self) -> None:
        """Remove the notes of a stage that the manifest now holds."""
        for path in (self._folder / "stage.partial.json", self._sums_path):
            path.unlink(missing_ok=True)


class Store:
    """Reads and writes one run folder. Arrays are memory-mapped on first use; writing to one
    changes only this process's copy (torch refuses to wrap read-only memory).

    Raises:
        OmniError: the folder is not a run folder, was written by a newer version, or damaged.
    """

    def __init__(self, run: Path | str):
        self.run = Path(run)
        self.folder = self.run / "store"
        self._arrays: dict[str, np.ndarray] = {}
        path = self.run / "manifest.json"
        self.manifest = read_json(path) if path.exists() else _empty_manifest()
        version = self.manifest.get("format_version") if isinstance(self.manifest, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise OmniError(
                f"{self.run} was written in format {version}, this omni reads {FORMAT_VERSION}: "
                "use the omni that wrote it or a new run folder"
            )
        if not _is_manifest(self.manifest):
            raise DamagedError(
                f"{path} is damaged: run `omni optimize VIDEO -o {self.run}` to rebuild the store"
            )

    @classmethod
    def open(cls, run: Path | str) -> "Store":
        """The store of a run whose preprocessing is finished, checked as a whole.

        Raises:
            OmniError: not finished, damaged, or its parts do not fit each other.
        """
        if not Path(run).is_dir():
            raise OmniError(f"run folder {run} does not exist: make one with `omni optimize VIDEO`")
        store = cls(run)
        if not {"frames", "flow", "evidence"} <= store.manifest["stages"].keys():
            raise OmniError(f"{run} holds no finished preprocessing: run `omni preprocess` first")
        for stage in store.manifest["stages"]:
            if not store.has(stage):
                raise DamagedError(
                    f"{store.folder / stage}.npy is missing or damaged (its checksum differs): "
                    f"run `omni optimize VIDEO -o {run}` to rebuild it"
                )
        if not store._fits():
            raise DamagedError(
                f"{store.run / 'manifest.json'} does not describe the arrays in {store.folder}: "
                f"delete it and run `omni optimize VIDEO -o {run}` to rebuild the store"
            )
        return store

    @classmethod
    def create(cls, run: Path | str) -> "Store":
        """The store of a run folder to write into; what is damaged there is computed again.

        Raises:
            OmniError: written by a newer version.
        """
        try:
            return cls(run)
        except DamagedError:
            path = Path(run) / "manifest.json"
            log.warning("%s is damaged: preprocessing starts anew", path)
            path.unlink()
            return cls(run)

    def has(self, stage: str, key: str | None = None) -> bool:
        """Whether `stage` is finished (under this `key`) and its files are as they were written."""
        record = self.manifest["stages"].get(stage)
        if record is None or (key is not None and record["key"] != key):
            return False
        return all(
            _is_intact(self.folder / name, file["bytes"], file["crc32"])
            for name, file in record["files"].items()
        )

    def _fits(self) -> bool:
        """Whether manifest and arrays, which anyone may have made, agree with each other."""
        try:
            stages, video = self.manifest["stages"], self.manifest["video"]
            shape, pairs, meta = self.frames.shape, self.pairs, self.meta("evidence")
            expected = {
                "frames": ((*shape[:3], 3), np.uint8),
                "flow": ((len(pairs), *shape[1:3], 2), np.int16),
                "evidence": ((len(pairs), *shape[1:3]), np.uint8),
                "doubt": ((len(pairs), *shape[1:3]), np.uint8),
                "masks": (shape[:3], np.uint8),
            }
            numbers = [meta["threshold"]]
            for gap in np.unique(np.abs(pairs[:, 1] - pairs[:, 0])).tolist():
                floor, slope = meta["sigma"][str(gap)]
                numbers += [floor, slope]
            if "landmarks" in stages:
                keys = np.asarray(self.meta("landmarks")["pairs"], np.int64).reshape(-1, 2)
                expected["landmarks"] = ((len(keys), *self.landmarks.shape[1:2], 4), np.float32)
                if not ((keys >= 0) & (keys < len(self.frames))).all():
                    return False
            return (
                all(f"{name}.npy" in stages[name]["files"] for name in stages)
                and all(
                    (self._array(name).shape, self._array(name).dtype) == expected[name]
                    for stage in stages.values()
                    for name in (Path(file).stem for file in stage["files"])
                )
                and len(self.frames) == video["num_frames"] >= 2
                and all(type(side) is int and 0 < side < 1 << 16 for side in video["size"])
                and len(video["size"]) == 2
                and math.prod(video["size"]) <= _MOST_PIXELS
                and all(0 < number < 1e6 for number in [*numbers, video["fps"]])
                and bool(((pairs >= 0) & (pairs < len(self.frames))).all())
                and bool((pairs[:, 0] != pairs[:, 1]).all())
            )
        except (OmniError, KeyError, TypeError, ValueError, OverflowError, AttributeError):
            return False

    def meta(self, stage: str) -> dict[str, Any]:
        """What a finished stage noted about its output."""
        return self.manifest["stages"][stage]["meta"]

    @contextmanager
    def stage(self, name: str, key: str, arrays: dict[str, tuple], items: int) -> Iterator[Stage]:
        """Write (or go on writing) a stage's arrays; enter it in the manifest on a clean exit.

        Args:
            name: the stage's name in the manifest.
            key: hash of its inputs and settings.
            arrays: name to (shape, dtype) of each array.
            items: number of independently resumable items.

        An exception or interruption inside leaves the finished items on disk for the next try.
        """
        record = self.manifest["stages"].get(name)
        if record is not None and record["key"] == key:
            log.warning("%s in %s is damaged: computing it again", name, self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._forget(name)
            stage = Stage(self.folder, key, arrays, items)
        except OSError as error:
            raise unwritable(self.folder, error) from None
        stage.meta = {}
        try:
            yield stage
        except BaseException:
            stage.flush()
            raise
        require_lock(self.run)
        self._record(name, key, stage.close(), stage.meta)
        stage.forget()

    def release(self) -> None:
        """Give back what was read of the arrays; it is read again when needed.

        Else all that was ever touched counts as this process's memory. Changes to the arrays, which
        were this process's alone, are lost.
        """
        for array in self._arrays.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                array._mmap.madvise(mmap.MADV_DONTNEED)

    def note(self, **values: Any) -> None:
        """Set top-level manifest entries (source, video facts) and write it."""
        self.manifest.update(values)
        self._write_manifest()

    def _forget(self, name: str) -> None:
        if self.manifest["stages"].pop(name, None) is not None:
            self._arrays.clear()
            self._write_manifest()

    def _record(self, name: str, key: str, files: dict, meta: dict) -> None:
        self.manifest["stages"][name] = {"key": key, "files": files, "meta": meta}
        self._write_manifest()

    def _write_manifest(self) -> None:
        require_lock(self.run)
        self.run.mkdir(parents=True, exist_ok=True)
        self.manifest["crc32"] = _manifest_crc32(self.manifest)
        data = json.dumps(self.manifest, indent=1)
        write_atomic(self.run / "manifest.json", data.encode())

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            path = self.folder / f"{name}.npy"
            try:
                self._arrays[name] = np.load(path, mmap_mode="c", allow_pickle=False)
            except Exception as error:  # a hostile header can fail anywhere in numpy's parser
                reason = " ".join(str(error).split())[:200]
                raise DamagedError(
                    f"{path} cannot be read ({reason}): run `omni preprocess` again"
                ) from None
        return self._arrays[name]

    @property
    def frames(self) -> np.ndarray:
        """(T, h, w, 3) uint8 RGB."""
        return self._array("frames")

    @property
    def masks(self) -> np.ndarray | None:
        """(T, h, w) uint8 labels, 255 unknown, or None where the user gave none."""
        return self._array("masks") if self.has("masks") else None

    @property
    def flow(self) -> np.ndarray:
        """(K, h, w, 2) int16, see `decode_flow`."""
        return self._array("flow")

    @property
    def doubt(self) -> np.ndarray | None:
        """(K, h, w) uint8, or None where the flow provider does not judge itself."""
        judged = "doubt.npy" in self.manifest["stages"]["flow"]["files"]
        return self._array("doubt") if judged else None

    @property
    def evidence(self) -> np.ndarray:
        """(K, h, w) uint8, see `unpack_evidence`."""
        return self._array("evidence")

    @property
    def landmarks(self) -> np.ndarray:
        """(P, M, 4) float32 x, y in either frame of matched features, NaN where unused."""
        return self._array("landmarks")

    @property
    def pairs(self) -> np.ndarray:
        """(K, 2) int64 source and target frame of each flow."""
        return np.asarray(self.meta("flow")["pairs"], dtype=np.int64).reshape(-1, 2)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) processing size."""
        return tuple(self.frames.shape[1:3])

    @property
    def video_size(self) -> tuple[int, int]:
        """(H, W) of the original video, in which all results are expressed."""
        return tuple(self.manifest["video"]["size"])

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.frames)

    @property
    def fps(self) -> float:
        """Frames per second of the processed sequence."""
        return float(self.manifest["video"]["fps"])


def _empty_manifest() -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "stages": {}}


def _is_manifest(manifest: Any) -> bool:
    """Whether a manifest is one, undamaged, and names nothing outside its folder."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
        return False
    if manifest.get("format_version") != FORMAT_VERSION:
        return False
    if "crc32" in manifest and manifest["crc32"] != _manifest_crc32(manifest):
        return False
    return all(_is_record(stage, record) for stage, record in manifest["stages"].items())


def _is_record(stage: str, record: Any) -> bool:
    try:
        return (
            isinstance(record["key"], str)
            and isinstance(record["meta"], dict)
            and (stage not in _NOTES or _NOTES[stage](record["meta"]))
            and all(
                Path(file).name == file
                and type(facts["bytes"]) is int
                and type(facts["crc32"]) is int
                for file, facts in record["files"].items()
            )
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _are_frames(values: Any) -> bool:
    return type(values) is list and all(type(v) is int and 0 <= v < 1 << 31 for v in values)


def _are_pairs(values: Any) -> bool:
    return type(values) is list and all(_are_frames(pair) and len(pair) == 2 for pair in values)


_NOTES = {
    "frames": lambda meta: _are_frames(meta["cuts"]),
    "flow": lambda meta: type(meta["provider"]) is str and _are_pairs(meta["pairs"]),
    "evidence": lambda meta: all(re.fullmatch(r"[1-9]\d{0,8}", gap) for gap in meta["sigma"]),
    "landmarks": lambda meta: _are_pairs(meta["pairs"]),
}
"""Whether what a stage noted is of the types that its readers take for granted."""


def _manifest_crc32(manifest: dict[str, Any]) -> int:
    rest = {name: value for name, value in manifest.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


_verified: dict[tuple, bool] = {}
"""Files checked by this process, by what changes when someone writes to them."""


def _is_intact(path: Path, size: int, crc32: int) -> bool:
    try:
        status = path.stat()
        if status.st_size != size or not stat.S_ISREG(status.st_mode):
            return False
        seen = path, status.st_ino, size, status.st_mtime_ns, crc32
        if seen not in _verified:
            _verified[seen] = crc32_of(path) == crc32
    except (OSError, ValueError):
        return False
    return _verified[seen]


def _is_own(path: Path) -> bool:
    """Whether writing to a file changes no file of another name or place."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _describe(arrays: dict[str, tuple]) -> dict[str, list]:
    return {name: [list(shape), np.dtype(dtype).str] for name, (shape, dtype) in arrays.items()}


def _allocate(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Make an `.npy` file of zeros that owns its disk space.

    Raises:
        OSError: the disk cannot hold it.
    """
    path.unlink(missing_ok=True)
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, facts)
        file.flush()
        length = math.prod(shape) * np.dtype(dtype).itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), file.tell(), length)
        else:
            file.truncate(file.tell() + length)


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and type of an `.npy` file whose size is what they ask for; else None."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
            whole = os.fstat(file.fileno()).st_size == size
    except Exception:  # a hostile header can fail anywhere in numpy's parser
        return None
    return (shape, dtype) if whole and not fortran else None
