"""Feed every reader of untrusted files with crafted ones; each must read or refuse them clearly.

    python tests/faults/fuzz.py --inputs 20000 [READER ...]

Hypothesis chooses what to do to a valid file: bytes overwritten, cut, doubled, moved, sizes made
absurd, at the surface or inside of an archive whose checksums are then made right again, or values
and keys of a JSON tree or of a checkpoint replaced. Each reader runs in a process of its own, which
may take 4 GB more than it starts with and 10 seconds per input. Counted as failures: any exception
but `OmniError`, a message of more than one line or 1,000 characters, a hang, a crash, a file
written elsewhere, and more than 512 MB taken by what is read.
"""

import argparse
import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from damage import plans
from hypothesis import HealthCheck, Phase, given, settings
from readers import READERS

from omni.errors import OmniError


class Hang(BaseException):
    pass


def on_alarm(number, frame):
    raise Hang("10 seconds")


def fuzz(name, inputs, folder):
    """Try `inputs` crafted files on a reader.

    Returns:
        counts of what was `read`, `refused`, and of failures by kind, and an example of each kind.
    """
    counts, examples, tried = Counter(), {}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.seterr(all="ignore")
        reader = READERS[name](folder)

        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(plans)
        def attempt(plan):
            nonlocal tried
            tried += 1
            signal.alarm(10)
            try:
                reader(plan)
                outcome = "read"
            except OmniError as error:
                clear = "\n" not in str(error) and len(str(error)) <= 1000
                outcome = "refused" if clear else "unclear message"
                problem = error
            except Hang as error:
                outcome, problem = "hang", error
            except Exception as error:
                outcome, problem = type(error).__name__, error
            finally:
                signal.alarm(0)
            counts[outcome] += 1
            if outcome not in ("read", "refused") and outcome not in examples:
                trace = traceback.format_exception(problem)
                examples[outcome] = f"{problem!s:.300} at {''.join(trace)[-900:]}"

        previous = signal.signal(signal.SIGALRM, on_alarm)
        try:
            while tried < inputs:  # Hypothesis stops early where it finds nothing new
                attempt()
        finally:
            signal.signal(signal.SIGALRM, previous)
    escaped = [str(p) for p in (folder.parent / "escaped", Path("/escaped")) if p.exists()]
    if escaped or Path("escaped").exists():
        counts["escaped"] += 1
    return {"reader": name, "inputs": tried, **counts, "examples": examples}


def peak_memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def failures(result):
    """Inputs that were neither read nor refused in one clear sentence; 1 more for much memory."""
    fine = result.get("read", 0) + result.get("refused", 0)
    return result["inputs"] - fine + result.get("greedy", 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        import torch  # noqa: F401 - its address space does not count

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))
        logging.disable(logging.ERROR)
        before = peak_memory_mb()
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            work.mkdir()
            result = fuzz(options.readers[0], options.inputs, work)
        result["peak_memory_mb"] = peak_memory_mb()
        if result["peak_memory_mb"] > before + 512:
            result["greedy"] = 1
            result["examples"]["greedy"] = f"{before} MB before, {result['peak_memory_mb']} at most"
        print(json.dumps(result))
        return
    results = []
    print(f"{'reader':12} {'inputs':>8} {'read':>8} {'refused':>8} {'failures':>8} {'peak MB':>8}")
    for name in options.readers or READERS:
        command = [sys.executable, __file__, name, "--alone", "--inputs", str(options.inputs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            print(f"{name:12} crashed with code {done.returncode}")
            results.append({"reader": name, "inputs": 0, "crashed": done.returncode})
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        shown = [result.get(key, 0) for key in ("inputs", "read", "refused")]
        shown += [failures(result), result["peak_memory_mb"]]
        print(f"{name:12}", *(f"{value:8}" for value in shown), flush=True)
        for kind, example in result["examples"].items():
            print(f"    {result[kind]} x {kind}: {example}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    sys.exit(any(r.get("crashed") or failures(r) for r in results))


if __name__ == "__main__":
    main()
