"""Train RAFT on generated pairs of images: the weights that `flow.provider=raft` can embed.

    python scripts/train_raft.py runs/raft

On a CUDA device if there is one. May be stopped at any moment; the same command continues.
`tensorboard --logdir runs/raft` shows end-point errors on fixed validation sets. Then

    python benchmarks/flow.py --weights runs/raft/weights.safetensors

says whether the weights are worth embedding, and

    cp runs/raft/weights.safetensors preprocess/raft_small.safetensors

embeds them.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from omni.errors import OmniError
from preprocess.training.raft_trainer import RaftTrainer, Recipe


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
    parser.add_argument("--validate-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options = vars(parser.parse_args())
    out, device, every = (options.pop(name) for name in ("out", "device", "validate_every"))
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with SummaryWriter(out / "tensorboard") as board:

        def show(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)
            if "epe/gap1" in values:
                text = ", ".join(f"{k} {v:.3f}" for k, v in values.items() if k.startswith("epe/"))
                logging.info("step %d: %s", step, text)

        options["size"] = tuple(options["size"])
        RaftTrainer(Recipe(**options), out, device, show).run(every)


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"train_raft: {error}")
    except KeyboardInterrupt:
        sys.exit("train_raft: stopped; the same command continues")
