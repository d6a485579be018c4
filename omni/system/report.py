"""`report.json`: what each stage of a run took, and what it noted."""

import json
import logging
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omni.errors import OmniError
from omni.system.files import read_json, write_atomic

__all__ = ["read_report", "timed"]

log = logging.getLogger(__name__)


@contextmanager
def timed(run: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Add the stage's wall time, peak memory and whatever it notes to `report.json`.

    Times of an interrupted and continued stage add up. A folder that cannot be written (a run can
    be read from anywhere) costs the report, not the stage.
    """
    import torch

    start = time.monotonic()
    record: dict[str, Any] = {}
    try:
        yield record
    finally:
        report = read_report(run)
        stages = report.setdefault("stages", {})
        before = stages.get(stage, {}).get("seconds", 0.0) if stage in ("preprocess", "fit") else 0
        record["seconds"] = round(before + time.monotonic() - start, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record["peak_memory_mb"] = round(peak / 1024)
        if torch.cuda.is_available():
            record["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        stages[stage] = {**stages.get(stage, {}), **record}
        if run.is_dir():
            try:
                write_atomic(run / "report.json", json.dumps(report, indent=1).encode())
            except OmniError as error:
                log.warning("%s", error)


def read_report(run: Path) -> dict[str, Any]:
    """The contents of a run's `report.json`; empty where there is none or it is damaged."""
    report = read_json(run / "report.json")
    return report if _is_report(report) else {}


def _is_report(report: Any) -> bool:
    """Whether it holds what `omni.views.summaries` shows, in the types it shows."""
    try:
        stages = report["stages"]
        held_out = stages.get("fit", {}).get("held_out", [])
        records = [(record["seconds"], record["peak_memory_mb"]) for record in stages.values()]
        errors = [(entry["median"], entry["within_1px"]) for entry in held_out]
        return all(
            type(number) in (int, float) and math.isfinite(number)
            for pair in records + errors
            for number in pair
        )
    except (KeyError, TypeError, AttributeError, OverflowError):
        return False
