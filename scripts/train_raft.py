"""Train RAFT on generated pairs of images: the weights that `flow.provider=raft` can embed.

    PYTHONPATH=. python scripts/train_raft.py runs/raft

needs torch, torchvision, OpenCV, SciPy, TensorBoard, safetensors and PyYAML, but no installation of
`omni`, and uses a CUDA device if there is one. May be stopped at any moment; the same command
continues. `tensorboard --logdir runs/raft` shows end-point errors on fixed validation sets.

50 steps in another folder show how long it will take: the log ends with seconds per step.

    PYTHONPATH=. python scripts/train_raft.py runs/timing --steps 50 --validation 2

Evaluating and embedding the weights: docs/model_card_raft.md.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from omni.errors import OmniError
from omni.views import Board
from preprocess.training import RaftTrainer, Recipe


def main() -> None:
    """Parse the command line and train."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", type=Path, help="folder of checkpoint, weights and TensorBoard files"
    )
    parser.add_argument("--variant", choices=("small", "large"), default=recipe.variant)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--size", type=int, nargs=2, default=recipe.size, metavar=("H", "W"))
    parser.add_argument("--updates", type=int, default=recipe.updates)
    parser.add_argument("--rate", type=float, default=recipe.rate)
    parser.add_argument("--textures", type=int, default=recipe.textures)
    parser.add_argument("--surfaces", type=int, default=recipe.surfaces)
    parser.add_argument("--samples", type=int, default=recipe.samples, help="rays per pixel")
    parser.add_argument("--validation", type=int, default=recipe.validation, help="pairs per set")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--validate-every", type=_positive, default=1000, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options = vars(parser.parse_args())
    out, device, every = (options.pop(name) for name in ("out", "device", "validate_every"))
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OmniError("no CUDA device is available: use --device cpu, or a CUDA build of torch")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options["size"] = tuple(options["size"])
    trainer = RaftTrainer(Recipe(**options), out, device)
    # Steps after the last checkpoint come again, and their points with them.
    first = trainer.step + 1 if trainer.step else 0
    with Board(out / "tensorboard", purge_step=first) as board:

        def report(step: int, values: dict[str, float]) -> None:
            board.scalars(values, step)
            if "epe/gap1" in values:
                shown = {k: v for k, v in values.items() if k.startswith(("epe/", "seconds"))}
                text = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                logging.info("step %d: %s", step, text)

        trainer.run(report, every)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"train_raft: {error}")
    except KeyboardInterrupt:
        sys.exit("train_raft: stopped; the same command continues")
