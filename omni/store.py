"""The on-disk contract between preprocessing and everything after it: the run folder's store.

    RUN/manifest.json          format version, source, one record per finished stage
    RUN/store/frames.npy       (T, h, w, 3) uint8, processing resolution
    RUN/store/masks.npy        (T, h, w) uint8 object labels, 0 background (only with masks)
    RUN/store/flow.npy         (K, h, w, 2) int16, pixels x FLOW_SCALE, source to target
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
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from omni.errors import DamagedError, OmniError
from omni.system import (
    Stage,
    crc32_of,
    read_json,
    require_lock,
    unwritable,
    write_atomic,
)

__all__ = ["FORMAT_VERSION", "UNKNOWN", "Store"]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1

UNKNOWN = 255
"""Mask label of pixels that the user left open."""

_MOST_PIXELS = 1 << 27
"""Of a frame of the video: a grid over more would not fit in memory."""


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
        store.check()
        return store

    def check(self) -> None:
        """Check that preprocessing is finished and everything is as it was written.

        Raises:
            OmniError: not finished, damaged, or its parts do not fit each other.
        """
        run = self.run
        if not {"frames", "flow", "evidence"} <= self.manifest["stages"].keys():
            raise OmniError(f"{run} holds no finished preprocessing: run `omni preprocess` first")
        for stage in self.manifest["stages"]:
            if not self.has(stage):
                raise DamagedError(
                    f"{self.folder / stage}.npy is missing or damaged (its checksum differs): "
                    f"run `omni optimize VIDEO -o {run}` to rebuild it"
                )
        if not self._fits():
            raise DamagedError(
                f"{run / 'manifest.json'} does not describe the arrays in {self.folder}: "
                f"delete it and run `omni optimize VIDEO -o {run}` to rebuild the store"
            )

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
        """Whether manifest and arrays, which are not trusted, agree with each other."""
        try:
            stages, video = self.manifest["stages"], self.manifest["video"]
            shape, pairs, meta = self.frames.shape, self.pairs, self.meta("evidence")
            expected: dict[str, tuple[tuple[int, ...], np.dtype]] = {
                "frames": ((*shape[:3], 3), np.dtype(np.uint8)),
                "flow": ((len(pairs), *shape[1:3], 2), np.dtype(np.int16)),
                "evidence": ((len(pairs), *shape[1:3]), np.dtype(np.uint8)),
                "masks": (shape[:3], np.dtype(np.uint8)),
            }
            numbers = [meta["threshold"]]
            for gap in np.unique(np.abs(pairs[:, 1] - pairs[:, 0])).tolist():
                floor, slope = meta["sigma"][str(gap)]
                numbers += [floor, slope]
            if "landmarks" in stages:
                keys = np.asarray(self.meta("landmarks")["pairs"], np.int64).reshape(-1, 2)
                matched = (len(keys), *self.landmarks.shape[1:2], 4)
                expected["landmarks"] = (matched, np.dtype(np.float32))
                if not ((keys >= 0) & (keys < len(self.frames))).all():
                    return False
            return (
                all(f"{name}.npy" in stages[name]["files"] for name in stages)
                and all(
                    (self._array(name).shape, self._array(name).dtype) == expected[name]
                    for name in stages  # further files, which older versions wrote, are not read
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
        """Write (or continue to write) a stage's arrays; enter it in the manifest on a clean exit.

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

        Otherwise all that was ever touched counts as this process's memory. Changes to the arrays,
        which were private to this process, are discarded.
        """
        for array in self._arrays.values():
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

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
"""Files checked by this process, by what changes when a file is written to."""


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
