"""Shared fixtures: a tiny video whose motion is known exactly, as frames, flows and a store."""

import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from omni.config import Config, ModelConfig, OptimConfig, SamplingConfig
from omni.field import Trainer
from omni.maths.coords import pixel_centers
from omni.maths.quantisation import decode_flow, encode_flow, pack_evidence
from omni.run import make_trainer
from omni.store import Store
from preprocess.evidence.consistency import assess, gap_statistics
from preprocess.flow.pairs import schedule

THRESHOLD = 1.5
SIGMA = (0.25, 0.6)
"""Floor and slope in the cycle error of every stored flow's standard deviation, pixels."""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal():
    """Under nohup or in the background of a script SIGHUP and SIGINT come ignored, and are so in
    every process the tests start."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGHUP)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@dataclass(frozen=True)
class Scene:
    """A background that pans and turns, and a textured square that slides over it.

    Everything is a closed form of time: positions are raster pixels of the processing size.
    """

    num_frames: int = 6
    size: tuple[int, int] = (24, 32)

    def background_pose(self, t):
        """(2, 2) and (2,): where background point p of frame 0 is at time t."""
        angle, center = 0.012 * t, np.array([16.0, 12.0])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return turn, center - turn @ center + t * np.array([0.7, -0.35])

    def square_pose(self, t):
        return np.eye(2), t * np.array([-1.4, 0.5])

    def move(self, xy, source, target, square):
        """Points (..., 2) of one layer at time `source`, at time `target`."""
        pose = self.square_pose if square else self.background_pose
        (a, b), (c, d) = pose(source), pose(target)
        return (np.asarray(xy) - b) @ np.linalg.inv(a).T @ c.T + d

    def on_square(self, xy, t):
        x, y = np.moveaxis(self.move(xy, t, 0, True), -1, 0)
        return (abs(x - 22) < 6) & (abs(y - 10) < 5)

    def track(self, xy, source, target):
        """Where the surface seen at points (..., 2) of frame `source` is at time `target`."""
        square = self.on_square(xy, source)[..., None]
        moved = [self.move(xy, source, target, which) for which in (True, False)]
        return np.where(square, *moved)

    def frame(self, t):
        xy = pixel_centers(self.size).astype(np.float64)
        textures = []
        for square, (kx, ky) in ((True, (0.9, 0.7)), (False, (0.5, 0.6))):
            x, y = np.moveaxis(self.move(xy, t, 0, square), -1, 0)
            phase = np.array([0.0, 1.5, 3.0]) + square
            wave = np.sin(kx * x[..., None] + phase) * np.cos(ky * y[..., None] - phase)
            textures.append(127 + 100 * wave)
        return np.where(self.on_square(xy, t)[..., None], *textures).round().astype(np.uint8)

    def flow(self, source, target):
        xy = pixel_centers(self.size).astype(np.float64)
        return (self.track(xy, source, target) - xy).astype(np.float32)


def write_store(run, frames, pairs, flows, evidence=None):
    """A finished store with the stages and notes that `preprocess.prepare` leaves.

    The original video is twice the processing size. Without `evidence` (a dict by pair), the
    flows are checked against each other, as in the pipeline.
    """
    store, (height, width) = Store(run), frames.shape[1:3]
    shape = (len(pairs), height, width)
    with store.stage("frames", "k1", {"frames": (frames.shape, np.uint8)}, len(frames)) as stage:
        stage.arrays["frames"][:] = frames
        stage.meta["cuts"] = []
    video = {"size": [2 * height, 2 * width], "fps": 25.0, "num_frames": len(frames)}
    store.note(source={"name": "scene", "fingerprint": "f"}, video=video)
    with store.stage("flow", "k2", {"flow": ((*shape, 2), np.int16)}, len(pairs)) as stage:
        for k, pair in enumerate(pairs):
            stage.arrays["flow"][k] = encode_flow(flows[tuple(pair)])
        stage.meta.update(pairs=[list(map(int, pair)) for pair in pairs], provider="exact")
    with store.stage("evidence", "k3", {"evidence": (shape, np.uint8)}, len(pairs)) as stage:
        codes = stage.arrays["evidence"]
        for k, (i, j) in enumerate(pairs):
            if evidence is None:
                there, back = (decode_flow(encode_flow(flows[p])) for p in ((i, j), (j, i)))
                codes[k] = pack_evidence(assess(there, back, THRESHOLD))
            else:
                codes[k] = pack_evidence(evidence[i, j])
        gaps = gap_statistics(codes, np.asarray(pairs), THRESHOLD)
        sigma = {str(entry["gap"]): list(SIGMA) for entry in gaps}
        stage.meta.update(threshold=THRESHOLD, sigma=sigma, gaps=gaps)
    return Store.open(run)


@pytest.fixture(scope="session", name="write_store")
def write_store_fixture():
    return write_store


@pytest.fixture(scope="session")
def scene():
    return Scene()


@pytest.fixture(scope="session")
def small_store(scene, tmp_path_factory):
    frames = np.stack([scene.frame(t) for t in range(scene.num_frames)])
    pairs = [tuple(map(int, pair)) for pair in schedule(scene.num_frames, "log", 4)]
    flows = {pair: scene.flow(*pair) for pair in pairs}
    return write_store(tmp_path_factory.mktemp("small_store"), frames, pairs, flows)


@pytest.fixture(scope="session")
def small_config():
    """A fit of the small store that takes a second or two."""
    return Config(
        model=ModelConfig(couplings=3, hidden=32, code_dim=8, grid_levels=3, surface=16),
        sampling=SamplingConfig(pairs=16, points=12),
        optim=OptimConfig(steps=150, warmup=10, evaluate_every=50, log_every=10, lr_canonical=0.05),
    )


@dataclass
class Fitted:
    trainer: Trainer
    before: dict
    scalars: list


@pytest.fixture(scope="session")
def fitted(small_store, small_config, tmp_path_factory):
    """A finished fit of the small store, what it reported, and its held-out error at the start."""
    scalars, path = [], tmp_path_factory.mktemp("fitted") / "checkpoint.pt"
    device = torch.device("cpu")
    trainer = make_trainer(small_store, small_config, path, device)
    trainer.on_scalars = lambda step, values: scalars.append((step, values))
    before = trainer.evaluate()
    trainer.run()
    return Fitted(trainer, before, scalars)
