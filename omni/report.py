"""`report.json`: what each stage of a run took, and what it noted."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from omni.files import write_atomic

__all__ = ["read_report", "timed"]


@contextmanager
def timed(run: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Add the stage's wall time, peak memory and whatever it notes to `report.json`.

    Times of an interrupted and continued stage add up.
    """
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
            write_atomic(run / "report.json", json.dumps(report, indent=1).encode())


def read_report(run: Path) -> dict[str, Any]:
    """The contents of a run's `report.json`; empty where there is none or it is damaged."""
    path = run / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
