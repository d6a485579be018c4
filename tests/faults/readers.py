"""Readers of the files of a run folder, which are not trusted either, and a list of all readers."""

import json
import zlib

import numpy as np
from damage import changed, crafted
from input_readers import (
    ConfigReader,
    ImageReader,
    MaskReader,
    NameReader,
    PickleReader,
    PredictionReader,
    QueriesReader,
    Reader,
    TracksReader,
    TruthReader,
    VideoReader,
)


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

        from omni.field.checkpoint import save_checkpoint
        from omni.field.model.field import Field
        from omni.system.schema import to_dict

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

        from omni.field.checkpoint import load_field

        load_field(self.path, 4, torch.device("cpu"))


class ResumeReader(Reader):
    """A fit that continues a checkpoint, byte for byte or entry by entry not what it saved."""

    suffix = ".pt"

    def make(self):
        from dataclasses import replace

        import torch

        from omni.config import OptimConfig, SamplingConfig
        from omni.field.checkpoint import load_checkpoint
        from omni.run import make_trainer
        from omni.store import Store

        torch.set_num_threads(1)
        config = replace(
            small_field(),
            sampling=SamplingConfig(pairs=2, points=4, tracks=0),
            optim=OptimConfig(steps=2, evaluate_every=1),
        )
        write_run(self.folder / "run")
        store = Store.open(self.folder / "run")
        self.trainer = make_trainer(store, config, self.path, torch.device("cpu"))
        self.fresh = self.trainer.state()
        self.trainer.run()
        self.trainer.save = lambda: None  # only reading is tried
        # The settings are not read here, and most of the entries would be theirs.
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


def write_run(run):
    """A preprocessed run of four frames of 8 x 12 pixels."""
    from omni.store import Store

    store, pairs = Store(run), [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]
    each = (6, 8, 12)
    checks = {"threshold": 1.5, "sigma": {"1": [0.25, 0.6]}, "gaps": [{"gap": 1}]}
    layout = {
        "frames": ({"frames": ((4, 8, 12, 3), np.uint8)}, {"cuts": []}),
        "masks": ({"masks": ((4, 8, 12), np.uint8)}, {}),
        "flow": ({"flow": ((*each, 2), np.int16)}, {"pairs": pairs, "provider": "dis"}),
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
        from omni.store import Store
        from omni.tracking.landmarks import Landmarks
        from omni.tracking.links import Links

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
            assert store.masks is None or store.masks.dtype == np.uint8
        finally:
            self.prepare()

    def prepare(self):
        from omni.config import FlowConfig
        from omni.store import Store
        from preprocess.flow.pairs import schedule
        from preprocess.flow.registry import accepts

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
        from omni.system.report import read_report, timed
        from omni.views.summaries import summary_table

        summary_table(read_report(self.folder))
        with timed(self.folder, "fit"):
            pass


class LockReader(Reader):
    def make(self):
        from omni.system import lock

        lock.PATIENCE, lock.TAKEOVER_DELAY = 0.001, 0.0
        self.path = self.folder / "lock"
        return [json.dumps({**lock._ours(), "pid": pid}).encode() for pid in (1, 1 << 22)]

    def read(self):
        from omni.system.lock import locked

        try:
            with locked(self.folder):
                assert self.path.exists()
        finally:
            self.path.unlink(missing_ok=True)


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
