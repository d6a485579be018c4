"""Readers of untrusted files that a user gives, one class each, and the base of all readers.

`seeds` are valid files; `read` may raise nothing but `OmniError`.
"""

import io
import json
import os

import numpy as np
from damage import crafted


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
        from omni.tracking.tracks import Tracks

        Tracks.load(self.path)


class QueriesReader(TracksReader):
    def read(self):
        from omni.tracking.tracks import load_queries

        load_queries(self.path)


class TruthReader(TracksReader):
    def make(self):
        tracks = some_tracks()
        area = {"annotated": tracks["visible"], "mask_area": np.ones(4), "meta": np.array("text")}
        video = {"video": np.zeros((4, 24, 32, 3), np.uint8)}
        plain = {name: tracks[name] for name in ("tracks", "visible")}
        return [npz(**tracks, **area), npz(**plain, **video)]

    def read(self):
        from omni.evaluation.truth import load_truth

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
        from omni.evaluation.truth import load_prediction

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
        from omni.evaluation.truth import load_truth

        load_truth(f"{self.path}:0")


class ConfigReader(Reader):
    suffix = ".yaml"

    def make(self):
        from omni.config import Config, to_yaml
        from omni.system.schema import to_dict

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
        from omni.video.images import image_size, read_image

        size = image_size(self.path)
        assert read_image(self.path).shape == (*size, 3)


class MaskReader(ImageReader):
    def read(self):
        from omni.video.images import read_mask

        mask, _ = read_mask(self.path)
        assert mask.ndim == 2 and mask.dtype == np.uint8


class VideoReader(Reader):
    suffix = ".mp4"

    def make(self):
        import av

        from omni.video.writing import write_video

        av.logging.set_level(None)
        frames = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
        write_video(self.path, iter(frames), 10.0)
        return [
            self.path.read_bytes(),
            b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
        ]

    def read(self):
        from omni.video.source import open_video

        for image in open_video(self.path):
            assert image.dtype == np.uint8


class NameReader(Reader):
    """Names of videos and of frames: nothing is read or written outside."""

    def make(self):
        return [b"clip.mp4", b"..mp4", b"....mp4", b"frame_0001.png", b"a/../../b.mp4", b"~/x.mp4"]

    def __call__(self, plan):
        from omni.run.stages import default_folder
        from omni.video.images import list_images

        name = os.fsdecode(crafted(self.seeds, plan)[:200].replace(b"\x00", b""))
        inside = self.folder / "runs"
        chosen = self.folder / default_folder(name, None)
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
