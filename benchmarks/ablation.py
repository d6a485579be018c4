"""Ablation of the fit and of the read-out: the same clips and flows without each part.

    python benchmarks/ablation.py --data ../shared/data/synthetic/dev --config cpu -o ablation.json

Every variant of the fit is scored fused with chains, by the field alone (`field ...`), and by the
pictures that it renders. `hidden` is the median distance in pixels at 256 x 256 between a point
and where it truly is, while another surface occludes it.

`free-form` replaces the inverse of the bijections by networks of their own, so that nothing
guarantees that mapping there and back is the identity. It exists here alone. `fitted frames` and
`omitted frames` both score (delta_avg alone) a fit to every second frame: at the frames that were
fitted, and half way between them.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from quality import Clip, find_clips, fitted, prepared, table
from record import write_record
from torch import Tensor

import omni.field.model.field
from omni import run as runs
from omni.config import Config, load_config
from omni.errors import OmniError
from omni.evaluation import DISTANCES, delta, evaluate, queries
from omni.field import RealNVP
from omni.maths import inside, rescale
from omni.store import Store
from omni.tracking import Reader, Tracks

SETTINGS = {
    "full": [],
    "no photometric": ["loss.photometric.weight=0", "loss.constancy.weight=0"],
    "no mining": ["sampling.mining=0"],
    "no layers": ["model.planes=0", "loss.surface.weight=1"],
    "no global motion": ["model.motion=none"],
    "no chains": ["sampling.tracks=0"],
    "free-form": [],
}
CHAINS = "chains alone"
HALF_RATE = ("fitted frames", "omitted frames")
VARIANTS = (*SETTINGS, CHAINS, *HALF_RATE)
SHOWN = ("AJ", "delta_avg", "OA", "TC", "hidden")
FIELD = ("field AJ", "field delta_avg", "field OA", "field hidden", "psnr")


class FreeForm(RealNVP):
    """A mapping whose inverse is another one of the same size, fitted along with it."""

    def __init__(self, code, *args, **kwargs):
        super().__init__(code, *args, **kwargs)
        self.back = RealNVP(code, *args, **kwargs)

    def embed(self, times: Tensor) -> list[Tensor]:
        """Of both networks, one after the other."""
        return super().embed(times) + self.back.embed(times)

    def forward(self, points: Tensor, embedding: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Local to canonical."""
        return super().forward(points, embedding[: len(self.couplings)])

    def inverse(self, points: Tensor, embedding: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Canonical to local, by the other network, forwards."""
        return self.back(points, embedding[len(self.couplings) :])


def main() -> None:
    """Fit and score every variant on every clip; print the table and write the JSON."""
    options = parse()
    config = load_config(options.config, options.set)
    rows = []
    for clip in find_clips(options.data, options.runs):
        for variant in options.variants:
            rows.append({"clip": clip.name, "method": variant, "seed": 0})
            rows[-1] |= measure(clip, variant, options.runs, config)
            print(f"{clip.name} {variant}: delta {rows[-1]['delta_avg']:.3f}", file=sys.stderr)
    print(table(rows, (*SHOWN, *FIELD)))
    if options.out:
        write_record(options.out, results=rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="clips or folders")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="kept run folders")
    parser.add_argument("--config", default="cpu", help="preset or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write")
    return parser.parse_args()


def measure(clip: Clip, variant: str, cache: Path, config: Config) -> dict[str, object]:
    """Scores of one variant on one clip."""
    if variant in HALF_RATE:
        return half_rate(clip, variant, cache, config)
    if variant == CHAINS:
        store = Store.open(prepared(clip, cache, config))
        reader = Reader(store, None, config.output.chunk)
        return scores(reader.tracks(points_of(clip)), clip) | dict.fromkeys(FIELD)
    reader = fit(clip, variant, cache, load_config(config, SETTINGS[variant]))
    alone = scores(field_alone(reader, points_of(clip)), clip)
    alone = {f"field {name}": value for name, value in alone.items()}
    return scores(reader.tracks(points_of(clip)), clip) | alone | {"psnr": psnr(reader)}


def points_of(clip: Clip) -> np.ndarray:
    """The queries `(N, 3)` of a clip, t y x."""
    return queries(clip.truth, "given").query_points.astype(np.float32)


def scores(tracks: Tracks, clip: Clip) -> dict[str, float]:
    """Metrics of TAP-Vid, TC, and `hidden`, None where no point is ever hidden."""
    truth = queries(clip.truth, "given")
    distance = np.linalg.norm(
        rescale(tracks.tracks, tracks.size, (256, 256))
        - rescale(truth.tracks, truth.size, (256, 256)),
        axis=-1,
    )
    inbounds = inside(np.nan_to_num(truth.tracks, nan=-1), truth.size)
    hidden = distance[~truth.visible & truth.annotated & inbounds]
    median = float(np.median(hidden)) if len(hidden) else None
    return {**evaluate(tracks, clip.truth, "given"), "hidden": median}


def psnr(reader: Reader) -> float:
    """Peak signal-to-noise ratio (dB) of every eighth frame as the field renders it."""
    square = []
    for t in range(0, reader.num_frames, 8):
        color, _ = reader.render(t)
        square.append(np.square(color - reader.frames[t] / np.float32(255)).mean())
    return float(-10 * np.log10(np.mean(square)))


def fit(clip: Clip, variant: str, cache: Path, config: Config) -> Reader:
    """The reader of a fit, made once."""
    free = variant == "free-form"
    with free_form() if free else contextlib.nullcontext():
        folder = fitted(clip, cache, config, variant if free else "")
        return runs.load(folder, config.device).reader


@contextlib.contextmanager
def free_form() -> Iterator[None]:
    """Fields made inside have a `FreeForm` in place of their bijections."""
    before, omni.field.model.field.RealNVP = omni.field.model.field.RealNVP, FreeForm
    try:
        yield
    finally:
        omni.field.model.field.RealNVP = before


def field_alone(reader: Reader, points: np.ndarray) -> Tracks:
    """Estimates of the field, without chains, fusion and smoothing."""
    estimate = reader.follow(points, np.arange(reader.num_frames))
    return Tracks(
        rescale(estimate.xy, reader.size, reader.video_size),
        estimate.visibility > 0.5,
        estimate.visibility,
        np.ones(estimate.visibility.shape, np.float32),
        points,
        reader.video_size,
        reader.fps,
    )


def half_rate(clip: Clip, variant: str, cache: Path, config: Config) -> dict[str, object]:
    """delta_avg of a fit to every second frame, at those frames or between them."""
    data = dataclasses.replace(config.data, stride=2)
    reader = fit(clip, variant, cache, dataclasses.replace(config, data=data))
    truth = clip.truth
    points = points_of(clip)
    rows = points[:, 0] % 2 == 0
    frames = np.arange(variant == "omitted frames", 2 * reader.num_frames - 1, 2)
    halved = points[rows] / np.array([2, 1, 1], np.float32)
    found = reader.tracks(halved, frames / 2).tracks
    found = rescale(found, reader.video_size, (256, 256))
    true = rescale(truth.tracks[rows][:, frames], truth.size, (256, 256))
    visible = truth.visible[rows][:, frames]
    scored = truth.annotated[rows][:, frames] & (frames != points[rows, :1])
    scores = [delta(found, true, visible, scored, distance) for distance in DISTANCES]
    return dict.fromkeys((*SHOWN, *FIELD)) | {"delta_avg": float(np.mean(scores))}


if __name__ == "__main__":
    try:
        main()
    except OmniError as error:
        sys.exit(f"ablation: {error}")
