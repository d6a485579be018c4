"""Every reader of untrusted files, one class each.

`seeds` are valid files; `read` may raise nothing but `OmniError`.
"""

import io
import json
import os
import zlib

import numpy as np
from damage import changed, crafted


class Reader:
    suffix = ""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / f"input{self.suffix}"
        self.seeds = self.make()

    def __call__(self, plan):
        self.path.write_bytes(crafted(self.seeds, plan, self.repair))
        self.read()

    def repair(self, data):
        return data


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def some_tracks():
    rng = np.random.default_rng(0)
    return {
        "tracks": rng.uniform(0, 20, (3, 4, 2)).astype(np.float32),
        "visible": rng.random((3, 4)) > 0.5,
        "visibility": rng.random((3, 4)).astype(np.float32),
        "sigma": rng.random((3, 4)).astype(np.float32),
        "query_points": np.array([[0, 1, 2], [1, 3, 4], [3, 5, 6]], np.float32),
        "size": np.array([24, 32]),
        "fps": np.float64(24),
        "format_version": np.int64(1),
    }


class TracksReader(Reader):
    suffix = ".npz"

    def make(self):
        return [npz(**some_tracks())]

    def read(self):
        from omni.tracks import Tracks

        Tracks.load(self.path)


class QueriesReader(TracksReader):
    def read(self):
        from omni.tracks import load_queries

        load_queries(self.path)


class TruthReader(TracksReader):
    def make(self):
        tracks = some_tracks()
        area = {"annotated": tracks["visible"], "mask_area": np.ones(4), "meta": np.array("text")}
        video = {"video": np.zeros((4, 24, 32, 3), np.uint8)}
        plain = {name: tracks[name] for name in ("tracks", "visible")}
        return [npz(**tracks, **area), npz(**plain, **video)]

    def read(self):
        from omni.truth import load_truth

        load_truth(self.path)


class PredictionReader(TracksReader):
    def make(self):
        tracks = some_tracks()
        cotracker = npz(
            pred_tracks=tracks["tracks"].transpose(1, 0, 2)[None],
            pred_visibility=tracks["visible"].T[None],
            queries=tracks["query_points"][None],
            size=tracks["size"],
        )
        return [cotracker, npz(**tracks)]

    def read(self):
        from omni.truth import load_prediction

        load_prediction(self.path)


class PickleReader(Reader):
    suffix = ".pkl"

    def make(self):
        import pickle

        tracks = some_tracks()
        clip = {
            "points": tracks["tracks"] / 32,
            "occluded": ~tracks["visible"],
            "video": np.zeros((4, 24, 32, 3), np.uint8),
        }
        return [pickle.dumps(clips, p) for p in (2, 4, 5) for clips in ([clip], {"0": clip})]

    def read(self):
        from omni.truth import load_truth

        load_truth(f"{self.path}:0")


def small_field():
    from omni.config import Config, ModelConfig

    model = ModelConfig(
        couplings=1, hidden=4, code_dim=4, grid_levels=1, grid_log2_size=5, grid_base=2, surface=2
    )
    return Config(model=model)


class CheckpointReader(Reader):
    suffix = ".pt"

    def make(self):
        import torch

        from omni.checkpoint import save_checkpoint
        from omni.config import to_dict
        from omni.model import Field

        torch.set_num_threads(1)
        config = small_field()
        state = {
            "key": "k",
            "config": to_dict(config),
            "num_frames": 4,
            "step": 3,
            "history": [{"step": 1, "mean": 0.5}],
            "field": Field(4, config.model, config.render).state_dict(),
            "sampler": {"residual": torch.ones(2), "generator": torch.ones(8, dtype=torch.uint8)},
        }
        save_checkpoint(self.path, state)
        return [self.path.read_bytes()]

    def read(self):
        import torch

        from omni.checkpoint import load_field

        load_field(self.path, 4, torch.device("cpu"))


class ResumeReader(Reader):
    """A fit that continues a checkpoint, byte for byte or entry by entry not what it saved."""

    suffix = ".pt"

    def make(self):
        from dataclasses import replace

        import torch

        from omni.checkpoint import load_checkpoint
        from omni.config import OptimConfig, SamplingConfig
        from omni.store import Store
        from omni.trainer import Trainer

        torch.set_num_threads(1)
        config = replace(
            small_field(),
            sampling=SamplingConfig(pairs=2, points=4, tracks=0),
            optim=OptimConfig(steps=2, evaluate_every=1),
        )
        write_run(self.folder / "run")
        store = Store.open(self.folder / "run")
        self.trainer = Trainer(store, config, self.path, torch.device("cpu"))
        self.fresh = self.trainer.state()
        self.trainer.run()
        self.trainer.save = lambda: None  # only reading is tried
        # Nobody reads the settings here, and most of the entries would be theirs.
        self.tree = load_checkpoint(self.path) | {"step": 1, "finished": False, "config": {}}
        self.tree["good"]["config"] = {}
        self.odd = [torch.zeros(1), torch.zeros(0), torch.full((3,), float("nan"))]
        self.odd += [torch.zeros(1).expand(1 << 40), torch.zeros(2, 3).t(), torch.ones(2).long()]
        return [self.path.read_bytes()]

    def __call__(self, plan):
        import torch

        which, kind, where, value, _ = plan
        self.trainer._restore(self.fresh)
        if kind in ("values", "keys"):
            if kind == "values" and which % 2:
                value = self.odd[which // 2 % len(self.odd)]
            tree = changed(self.tree, kind, where, value)
            if not isinstance(tree, dict):
                return
            torch.save(tree, self.path)
            self.trainer.run()
        else:
            super().__call__(plan)

    def read(self):
        self.trainer.run()


class ConfigReader(Reader):
    suffix = ".yaml"

    def make(self):
        from omni.config import Config, to_dict, to_yaml

        aliases = "\n".join(
            ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
        )
        tree = json.dumps(to_dict(Config()))
        short = "optim: {steps: 3, betas: [0.9, 0.99]}\nflow: {provider: dis}\n"
        return [
            tree.encode(),
            tree.encode(),
            to_yaml(Config()).encode(),
            short.encode(),
            f"{aliases}\nseed: *a59\n".encode(),
        ]

    def read(self):
        from omni.config import load_config

        load_config(str(self.path), ["optim.steps=5"])


def write_run(run):
    """A preprocessed run of four frames of 8 x 12 pixels."""
    from omni.store import Store

    store, pairs = Store(run), [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]
    each = (6, 8, 12)
    checks = {"threshold": 1.5, "sigma": {"1": [0.25, 0.6]}, "gaps": [{"gap": 1}]}
    layout = {
        "frames": ({"frames": ((4, 8, 12, 3), np.uint8)}, {"cuts": []}),
        "masks": ({"masks": ((4, 8, 12), np.uint8)}, {}),
        "flow": (
            {"flow": ((*each, 2), np.int16), "doubt": (each, np.uint8)},
            {"pairs": pairs, "provider": "dis"},
        ),
        "evidence": ({"evidence": (each, np.uint8)}, checks),
        "landmarks": ({"landmarks": ((2, 5, 4), np.float32)}, {"pairs": [[0, 2], [0, 3]]}),
    }
    for name, (arrays, meta) in layout.items():
        with store.stage(name, "k", arrays, len(pairs)) as stage:
            stage.meta.update(meta)
    store.note(
        source={"name": "clip.mp4", "fingerprint": "f"},
        video={"size": [16, 24], "fps": 24.0, "num_frames": 4},
    )


class ManifestReader(Reader):
    def make(self):
        write_run(self.folder / "run")
        self.path = self.folder / "run" / "manifest.json"
        return [self.path.read_bytes()]

    def repair(self, data):
        """An attacker writes the right checksum."""
        try:
            tree = json.loads(data)
            rest = {name: value for name, value in tree.items() if name != "crc32"}
            tree["crc32"] = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
            return json.dumps(tree).encode()
        except (ValueError, AttributeError, RecursionError):
            return data

    def read(self):
        """As a fit and a read-out do, then as preprocessing does."""
        from omni.landmarks import Landmarks
        from omni.links import Links
        from omni.store import Store

        try:
            store = Store.open(self.folder / "run")
            links, landmarks = Links(store), Landmarks(store)
            point = np.array([[3.0, 4.0]], np.float32)
            for source, target in filter(lambda pair: links.stored(*pair), store.pairs.tolist()):
                links.follow(source, target, point)
            for target in range(store.num_frames):
                for source in landmarks.sources(target):
                    landmarks.follow(source, target, point)
            assert store.fps > 0 and min(store.video_size) > 0
            for array in (store.masks, store.doubt):
                assert array is None or array.dtype == np.uint8
        finally:
            self.prepare()

    def prepare(self):
        from omni.config import FlowConfig
        from omni.store import Store
        from preprocess.flow import accepts
        from preprocess.pairs import schedule

        store = Store.create(self.folder / "run")
        if store.has("frames"):
            schedule(4, "log", 2, store.meta("frames")["cuts"])
        if store.has("flow"):
            accepts(FlowConfig(), store.meta("flow")["provider"])


class ArrayReader(ManifestReader):
    """Arrays of the store, under a manifest that has their size and checksum right."""

    def make(self):
        super().make()
        self.manifest = self.path
        self.path = self.folder / "run" / "store" / "flow.npy"
        return [self.path.read_bytes()]

    def repair(self, data):
        return data

    def read(self):
        data, tree = self.path.read_bytes(), json.loads(self.manifest.read_text())
        files = tree["stages"]["flow"]["files"]
        files["flow.npy"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
        text = ManifestReader.repair(self, json.dumps(tree).encode())
        self.manifest.write_bytes(text)
        super().read()


class StageReader(Reader):
    """The files of an interrupted stage: continued, or started anew."""

    def make(self):
        self.run, self.turn = self.folder / "run", 0
        self.names = ("stage.partial.json", "stage.done", "flow.partial.npy")
        self.arrays = {"flow": ((6, 8, 12, 2), np.int16)}
        self.reopen()
        return [(self.run / "store" / name).read_bytes() for name in self.names]

    def reopen(self):
        from omni.store import Store

        class Stop(Exception):
            pass

        try:
            with Store(self.run).stage("flow", "k", self.arrays, 6) as stage:
                for item in range(4):
                    stage.arrays["flow"][item] = item
                    stage.mark(item)
                raise Stop
        except Stop:
            assert stage.done.sum() == 4

    def __call__(self, plan):
        which = plan[0] % 3
        for name, seed in zip(self.names, self.seeds, strict=True):
            (self.run / "store" / name).write_bytes(seed)
        data = crafted([self.seeds[which]], plan)
        (self.run / "store" / self.names[which]).write_bytes(data)
        self.reopen()


class ReportReader(Reader):
    def make(self):
        self.path = self.folder / "report.json"
        fit = {"held_out": [{"median": 0.5, "mean": 1.0, "within_1px": 0.9}], "steps": 5}
        fit.update(seconds=1.0, peak_memory_mb=100)
        return [json.dumps({"stages": {"fit": fit, "export": fit}}).encode()]

    def read(self):
        from omni.report import read_report, timed
        from omni.summaries import summary_table

        summary_table(read_report(self.folder))
        with timed(self.folder, "fit"):
            pass


class LockReader(Reader):
    def make(self):
        from omni import lock

        lock.PATIENCE, lock.SETTLE = 0.001, 0.0
        self.path = self.folder / "lock"
        return [json.dumps({**lock._ours(), "pid": pid}).encode() for pid in (1, 1 << 22)]

    def read(self):
        from omni.lock import locked

        try:
            with locked(self.folder):
                assert self.path.exists()
        finally:
            self.path.unlink(missing_ok=True)


class ImageReader(Reader):
    suffix = ".png"

    def make(self):
        from PIL import Image

        rng, seeds = np.random.default_rng(0), []
        image = Image.fromarray(rng.integers(0, 255, (9, 11, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        for format, mode in (
            ("PNG", "RGB"),
            ("PNG", "P"),
            ("PNG", "LA"),
            ("JPEG", "RGB"),
            ("PNG", "I;16"),
            ("GIF", "P"),
            ("TIFF", "RGB"),
            ("EPS", "RGB"),
        ):
            buffer = io.BytesIO()
            picture = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
            picture.save(buffer, format, **({"exif": exif} if format == "JPEG" else {}))
            seeds.append(buffer.getvalue())
        return seeds

    def read(self):
        from omni.images import image_size, read_image

        size = image_size(self.path)
        assert read_image(self.path).shape == (*size, 3)


class MaskReader(ImageReader):
    def read(self):
        from omni.images import read_mask

        mask, _ = read_mask(self.path)
        assert mask.ndim == 2 and mask.dtype == np.uint8


class VideoReader(Reader):
    suffix = ".mp4"

    def make(self):
        import av

        from omni.video import write_video

        av.logging.set_level(None)
        frames = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
        write_video(self.path, iter(frames), 10.0)
        return [
            self.path.read_bytes(),
            b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
        ]

    def read(self):
        from omni.video import open_video

        for image in open_video(self.path):
            assert image.dtype == np.uint8


class NameReader(Reader):
    """Names of videos and of frames: nothing is read or written outside."""

    def make(self):
        return [b"clip.mp4", b"..mp4", b"....mp4", b"frame_0001.png", b"a/../../b.mp4", b"~/x.mp4"]

    def __call__(self, plan):
        from omni.images import list_images
        from omni.run import default_run

        name = os.fsdecode(crafted(self.seeds, plan)[:200].replace(b"\x00", b""))
        inside = self.folder / "runs"
        chosen = self.folder / default_run(name)
        assert chosen.resolve().parent == inside.resolve(), name
        frame = os.path.basename(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        frames = self.folder / "frames"
        frames.mkdir(exist_ok=True)
        if frame not in ("", ".", ".."):
            path = frames / f"{frame[:60]}.png"
            path.write_bytes(b"x")
            try:
                assert list_images(frames) == [path]
            finally:
                path.unlink()


READERS = {
    "tracks": TracksReader,
    "queries": QueriesReader,
    "truth": TruthReader,
    "prediction": PredictionReader,
    "pickle": PickleReader,
    "checkpoint": CheckpointReader,
    "resume": ResumeReader,
    "config": ConfigReader,
    "manifest": ManifestReader,
    "arrays": ArrayReader,
    "stage": StageReader,
    "report": ReportReader,
    "lock": LockReader,
    "image": ImageReader,
    "mask": MaskReader,
    "video": VideoReader,
    "names": NameReader,
}
