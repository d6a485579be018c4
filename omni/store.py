"""The on-disk contract between preprocessing and everything after it: the run folder's store.

    RUN/manifest.json          format version, source, one record per finished stage
    RUN/store/frames.npy       (T, h, w, 3) uint8, processing resolution
    RUN/store/masks.npy        (T, h, w) uint8 object labels, 0 background (only with masks)
    RUN/store/flow.npy         (K, h, w, 2) int16, pixels x FLOW_SCALE, source to target
    RUN/store/doubt.npy        (K, h, w) uint8, only from flow providers that judge themselves:
                               sigma and hidden, packed as error and occluded of evidence
    RUN/store/evidence.npy     (K, h, w) uint8, see `pack_evidence`

Letters: T frames, K ordered frame pairs, h x w processing size. A stage writes `NAME.partial.npy`
and a `.done` byte per item, so that an interrupted one continues; only a finished one is renamed
and entered in the manifest, under a key that hashes its inputs and settings. Nothing is ever
overwritten in place, all paths are relative to the run folder.
"""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni.errors import OmniError

__all__ = [
    "FLOW_SCALE",
    "FORMAT_VERSION",
    "Evidence",
    "Stage",
    "Store",
    "decode_flow",
    "encode_flow",
    "pack_evidence",
    "unpack_evidence",
    "write_atomic",
]

FORMAT_VERSION = 1
FLOW_SCALE = 32
"""int16 flow is pixels x 32: steps of 1/32 pixel up to 1023 pixels."""

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


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Stage:
    """An unfinished stage: memory-mapped arrays plus one done-flag per item.

    Attributes:
        arrays: name to writable memory map.
        done: (items,) bool, what earlier (interrupted) work already wrote.
    """

    def __init__(self, folder: Path, key: str, arrays: dict[str, tuple], items: int):
        self._folder, self._names = folder, list(arrays)
        state = folder / "stage.partial.json"
        expected = {"key": key, "arrays": _describe(arrays), "items": items}
        resumable = _read_json(state) == expected and all(
            self._partial(name).is_file() for name in arrays
        )
        if not resumable:
            state.unlink(missing_ok=True)
            for name, (shape, dtype) in arrays.items():
                file = np.lib.format.open_memmap(self._partial(name), "w+", dtype, shape)
                file.flush()
            self._done_path.write_bytes(bytes(items))
            write_atomic(state, json.dumps(expected).encode())
        self.arrays = {
            name: np.lib.format.open_memmap(self._partial(name), "r+") for name in arrays
        }
        self.done = np.memmap(self._done_path, dtype=np.uint8, mode="r+", shape=(items,))

    @property
    def _done_path(self) -> Path:
        return self._folder / "stage.done"

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.partial.npy"

    def mark(self, item: int) -> None:
        """Note that `item` is written completely. Call after writing it to every array."""
        self.done[item] = 1

    def flush(self) -> None:
        """Push everything written so far to disk, data before flags."""
        for array in self.arrays.values():
            array.flush()
        self.done.flush()

    def close(self) -> dict[str, dict[str, Any]]:
        """Rename the arrays to their final names; returns size and checksum of each."""
        self.flush()
        self.arrays.clear()
        records = {}
        for name in self._names:
            records[f"{name}.npy"] = {
                "bytes": self._partial(name).stat().st_size,
                "crc32": _crc32(self._partial(name)),
            }
        for name in self._names:
            os.replace(self._partial(name), self._folder / f"{name}.npy")
        for path in (self._done_path, self._folder / "stage.partial.json"):
            path.unlink(missing_ok=True)
        return records


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
        self.manifest = _read_json(path) if path.exists() else _empty_manifest()
        if not isinstance(self.manifest, dict) or not isinstance(self.manifest.get("stages"), dict):
            raise OmniError(
                f"{path} is damaged: delete it and run `omni optimize` again to rebuild the store"
            )
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise OmniError(
                f"{self.run} was written in format {version}, this omni reads {FORMAT_VERSION}: "
                "use the omni that wrote it or a new run folder"
            )

    @classmethod
    def open(cls, run: Path | str) -> "Store":
        """The store of a run whose preprocessing is finished."""
        if not Path(run).is_dir():
            raise OmniError(f"run folder {run} does not exist: make one with `omni optimize VIDEO`")
        store = cls(run)
        if not store.has("flow"):
            raise OmniError(f"{run} holds no finished preprocessing: run `omni preprocess` first")
        return store

    def has(self, stage: str, key: str | None = None) -> bool:
        """Whether `stage` is finished (under this `key`) and its files have their full size."""
        record = self.manifest["stages"].get(stage)
        if record is None or (key is not None and record["key"] != key):
            return False
        return all(
            (self.folder / name).is_file() and (self.folder / name).stat().st_size == file["bytes"]
            for name, file in record["files"].items()
        )

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
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget(name)
        stage = Stage(self.folder, key, arrays, items)
        stage.meta = {}
        try:
            yield stage
        except BaseException:
            stage.flush()
            raise
        self._record(name, key, stage.close(), stage.meta)

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
        self.run.mkdir(parents=True, exist_ok=True)
        data = json.dumps(self.manifest, indent=1)
        write_atomic(self.run / "manifest.json", data.encode())

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            path = self.folder / f"{name}.npy"
            try:
                self._arrays[name] = np.load(path, mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise OmniError(
                    f"{path} cannot be read ({error}): run `omni preprocess` again"
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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None


def _describe(arrays: dict[str, tuple]) -> dict[str, list]:
    return {name: [list(shape), np.dtype(dtype).str] for name, (shape, dtype) in arrays.items()}


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
