"""`omni COMMAND ...`: parse, call, print. One clear sentence and exit code 2 on bad input."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from omni.errors import OmniError
from omni.system import Finding, examine_machine, out_of_memory, raise_interrupted, stop_signals

__all__ = ["main"]

Out = Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")]
Settings = Annotated[str | None, arg(metavar="NAME|FILE")]
Overrides = UseAppendAction[Annotated[list[str], arg(name="set", metavar="KEY=VALUE")]]


def optimize(
    video: Positional[Path],
    /,
    out: Out = None,
    config: Settings = None,
    overrides: Overrides = [],  # noqa: B006 - tyro reads the default, it is never mutated
    masks: Path | None = None,
    matches: Path | None = None,
) -> None:
    """Preprocess, fit, export and visualise one video. Run again to continue.

    Args:
        video: video file or folder of frames
        out: run folder (default runs/NAME)
        config: preset (cpu, default, paper) or YAML file (default: by device)
        overrides: change one setting, e.g. --set optim.steps=500; may be repeated
        masks: folder of per-frame label PNGs, or one mask
        matches: tracks .npz of another tracker, used as further correspondences
    """
    from omni import run

    result = run.optimize(video, out, config, overrides, masks, matches)
    folder = result.folder
    print(f"tracks       {folder / 'tracks.npz'}")
    print(f"overlay      {folder / 'overlay.mp4'}")
    print(f"report       {folder / 'report.json'}")
    print(f"TensorBoard  omni board {folder}")


def track(
    video: Positional[Path],
    /,
    out: Out = None,
    config: Settings = None,
    overrides: Overrides = [],  # noqa: B006
    masks: Path | None = None,
    queries: Path | None = None,
) -> None:
    """Track by integrating flows, without a fit: a quick result. Writes RUN/chains.npz.

    Args:
        video: video file or folder of frames
        out: run folder (default runs/NAME)
        config: preset or YAML file (default: by device)
        overrides: change one setting; may be repeated
        masks: folder of per-frame label PNGs, or one mask
        queries: .npz with query_points (N, 3) t y x (default: the exported grid)
    """
    from omni import run

    print(run.track(video, out, config, overrides, masks, queries))


def preprocess(
    video: Positional[Path],
    /,
    out: Annotated[Path, arg(aliases=["-o"], metavar="PATH")],
    config: Settings = None,
    overrides: Overrides = [],  # noqa: B006
    masks: Path | None = None,
) -> None:
    """Frames, flows, consistency and masks of a video into a run folder.

    Args:
        video: video file or folder of frames
        out: run folder
        config: preset or YAML file (default: by device)
        overrides: change one setting; may be repeated
        masks: folder of per-frame label PNGs, or one mask
    """
    from omni import run

    run.preprocess_video(video, out, config, overrides, masks)


def fit(
    run: Positional[Path],
    /,
    config: Settings = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Fit the field of a preprocessed run; continues an interrupted fit.

    Args:
        run: run folder
        config: preset or YAML file (default: the run's own)
        overrides: change one setting; may be repeated
    """
    from omni import run as runs

    runs.fit(run, config, overrides)


def export(
    run: Positional[Path],
    /,
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE.npz")],
    queries: Path | None = None,
    frame: int | None = None,
    grid: int | None = None,
    dense: bool = False,
    exact: bool = False,
    times: list[float] | None = None,
) -> None:
    """Write trajectories of a fitted run.

    Args:
        run: run folder
        out: .npz to write
        queries: .npz with query_points (N, 3) t y x
        frame: frame whose grid is exported
        grid: stride of the grid in pixels
        dense: every pixel (or every --grid-th) as (H', W', T, 2)
        exact: with --dense, select each pixel's track among all its candidates; slower
        times: times in frames, may be fractional (default: every frame)
    """
    import numpy as np

    from omni import run as runs

    moments = None if times is None else np.asarray(times, np.float32)
    runs.export(run, out, queries, frame, grid, dense, exact, moments)
    print(out)


def visualize(run: Positional[Path], /) -> None:
    """Write overlay, colour and depth videos and TensorBoard summaries of a run.

    Args:
        run: run folder
    """
    from omni import run as runs

    runs.visualize(run)
    print(run / "overlay.mp4")


def board(run: Positional[Path], /, port: int = 6006, host: str = "127.0.0.1") -> None:
    """Serve a run, or a folder of runs, in TensorBoard until Ctrl-C.

    Args:
        run: run folder
        port: of the web page
        host: 0.0.0.0 to reach it from other machines
    """
    from omni.views import serve

    serve(run, port, host)


def evaluate(
    prediction: Positional[Path],
    truth: Positional[str],
    /,
    mode: Literal["first", "strided", "given"] = "given",
    out: Out = None,
) -> None:
    """Score tracks against ground truth as TAP-Vid does.

    Args:
        prediction: tracks .npz (of omni, or of CoTracker's arrays)
        truth: .npz, or TAP-Vid pickle as FILE.pkl:CLIP
        mode: how queries are drawn from the truth
        out: JSON to write
    """
    import json

    from omni.evaluation import evaluate as score
    from omni.evaluation import format_scores, load_prediction, load_truth
    from omni.system import write_atomic

    scores = score(load_prediction(prediction), load_truth(truth), mode)
    if out is not None:
        write_atomic(out, json.dumps(scores, indent=1).encode())
    print(format_scores(scores))


def baseline(
    run: Positional[Path],
    /,
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE.npz")],
    method: Literal["direct", "chain", "mft"] = "mft",
    queries: Path | None = None,
) -> None:
    """Track by following the run's flows alone, as a baseline for the field.

    Args:
        run: preprocessed run folder
        out: .npz to write
        method: direct, chain (adjacent flows) or mft (best of several gaps)
        queries: .npz with query_points (N, 3) t y x (default: the exported grid)
    """
    from omni import run as runs

    runs.track_baseline(run, out, method, queries)
    print(out)


def weights(
    action: Positional[Literal["list", "get"]] = "list",
    network: Positional[str | None] = None,
    /,
) -> None:
    """Weights of flow networks: which are known and where they are, or download some.

    Args:
        action: list, or get
        network: what to get, e.g. omni weights get gmflow
    """
    from preprocess.flow import PUBLISHED, cached_weights, get_weights

    if action == "get":
        if network is None:
            raise OmniError(f"name what to get: omni weights get {' | '.join(PUBLISHED)}")
        print(get_weights(network).path)
        return
    for name, published in PUBLISHED.items():
        found = cached_weights(name)
        place = f"omni weights get {name}" if found is None else f"{found.path} ({found.origin})"
        print(f"{name:<12}{place}")
        print(f"{'':<12}{published.licence}; {published.source}; SHA-256 {published.digest}...")


def doctor(run: Positional[Path | None] = None, /) -> None:
    """Check this machine, and a run folder: what works, and how to repair the rest.

    Args:
        run: run folder to check as well
    """
    problems = 0
    for finding in _findings(run):
        print(finding)
        problems += finding.status == "problem"
    if problems:
        sys.exit(1)


def _findings(run: Path | None) -> Iterator[Finding]:
    if (yield from examine_machine(Path.cwd() if run is None else run)):
        from omni.run import examine  # not without a torch that can be imported

        yield from examine(run)


COMMANDS = {
    function.__name__: function
    for function in (
        *(optimize, track, preprocess, fit, export, visualize, board, evaluate, baseline),
        *(weights, doctor),
    )
}


def main(args: list[str] | None = None) -> None:
    """Entry point of the `omni` command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with stop_signals(raise_interrupted):
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="omni",
                description="Dense long-range motion of one video.",
                args=args,
            )
    except OmniError as error:
        _leave(error, 2)
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _leave(
            f"{error.filename or 'a file'}: {error.strerror or error}; see that the disk is not "
            "full and the folder can be written, then run the same command again",
            2,
        )
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        name = signal.Signals(number).name
        _leave(f"stopped by {name}; run the same command again to continue", 128 + number)
    except Exception as error:
        if not out_of_memory(error):
            raise
        _leave(
            "out of memory; lower data.resolution, model.hidden or output.chunk, or use a "
            "machine with more, then run the same command again",
            2,
        )


def _leave(message: object, code: int) -> None:
    """Print one line, whatever bytes a file name contains, and exit."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    print(f"omni: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
