"""Print how well a demo run follows its known motion, beside following the flow chain alone."""

import argparse
from pathlib import Path

from omni.evaluation import baseline, evaluate, load_truth
from omni.run import load


def main() -> None:
    """Score the run in DEMO/run against DEMO/demo_truth.npz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder that scripts/make_demo.py wrote")
    folder = parser.parse_args().demo
    run = load(folder / "run")
    truth = load_truth(folder / "demo_truth.npz")
    scores = {"omni": evaluate(run.tracks(truth.query_points), truth, "given")}
    for method in ("chain", "mft"):
        scores[method] = evaluate(baseline(run.store, truth.query_points, method), truth, "given")
    print(f"\nagainst the known motion ({len(truth.query_points)} points):")
    print(f"{'':22}{'AJ':>7}{'delta':>7}{'OA':>7}{'TC px':>7}")
    names = {"omni": "omni", "chain": "flow chain alone", "mft": "best flow over gaps"}
    for key, name in names.items():
        row = scores[key]
        percent = "".join(f"{100 * row[k]:7.1f}" for k in ("AJ", "delta_avg", "OA"))
        print(f"{name:22}{percent}{row['TC']:7.2f}")
    seconds = sum(stage["seconds"] for stage in run.report["stages"].values())
    print(f"\ntook         {seconds:.0f} s")
    print(f"tracks       {run.folder / 'tracks.npz'}")
    print(f"video        {run.folder / 'overlay.mp4'}")
    print(f"TensorBoard  .venv/bin/omni board {run.folder}")


if __name__ == "__main__":
    main()
