"""Videos with nothing to track, or nothing but trouble, still finish with sensible output."""

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import omni

SIZE = (32, 48)
SETTINGS = [
    "optim.steps=20",
    "optim.evaluate_every=10",
    "sampling.pairs=8",
    "model.hidden=16",
    "threads=1",
    "flow.workers=1",
    "device=cpu",
    "output.grid=8",
    "output.render_side=16",
    "output.render_frames=2",
]


def texture(size=SIZE, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def moving(frames=6, size=SIZE, seed=0):
    wide = texture((size[0], size[1] + frames), seed)
    return [wide[:, frames - t : frames - t + size[1]] for t in range(frames)]


def single_point():
    frames = [np.full((*SIZE, 3), 90, np.uint8) for _ in range(6)]
    for t, frame in enumerate(frames):
        frame[16, 10 + 3 * t] = 255
    return frames


def bordered():
    frames = [frame.copy() for frame in moving()]
    for frame in frames:
        frame[0], frame[-1], frame[:, 0], frame[:, -1] = 0, 0, 0, 0
    return frames


VIDEOS = {
    "static": lambda: [texture()] * 6,
    "black": lambda: [np.zeros((*SIZE, 3), np.uint8)] * 6,
    "uniform colour": lambda: [np.full((*SIZE, 3), (200, 40, 90), np.uint8)] * 6,
    "pure noise": lambda: list(
        np.random.default_rng(0).integers(0, 255, (6, *SIZE, 3), dtype=np.uint8)
    ),
    "single moving point": single_point,
    "hard cut": lambda: moving(4) + moving(4, seed=9),
    "two frames": lambda: moving(2),
    "1-pixel borders": bordered,
    "1 pixel wide": lambda: moving(3, (40, 1)),
    "16:1 aspect": lambda: moving(4, (16, 256)),
    "alternating frames": lambda: [texture(seed=t % 2) for t in range(6)],
    "fade to black": lambda: [(texture() * (1 - t / 5)).astype(np.uint8) for t in range(6)],
}


def stays_where_it_is(run, tracks):
    assert np.abs(tracks.tracks - tracks.tracks[:, :1]).max() < 0.1 and tracks.visible.all()


def ends_at_the_cut(run, tracks):
    assert run.store.meta("frames")["cuts"] == [4]
    assert tracks.visible[:, :4].mean() > 0.5 and tracks.visible[:, 4:].mean() < 0.1


def follows_the_motion(run, tracks):
    inner = (tracks.query_points[:, 2] < 38) & (tracks.query_points[:, 2] > 8)
    moved = tracks.tracks[inner, -1] - tracks.tracks[inner, 0]
    frames = tracks.tracks.shape[1]
    assert np.abs(np.median(moved, axis=0) - [frames - 1, 0]).max() < 0.5


SENSIBLE = {
    "static": stays_where_it_is,
    "hard cut": ends_at_the_cut,
    "two frames": follows_the_motion,
    "1-pixel borders": follows_the_motion,
    "16:1 aspect": follows_the_motion,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEOS)
def test_a_degenerate_video_finishes_with_finite_output(name, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    images = VIDEOS[name]()
    for t, image in enumerate(images):
        iio.imwrite(frames / f"{t}.png", image)
    run = omni.optimize(frames, tmp_path / "run", "cpu", SETTINGS)
    tracks = omni.Tracks.load(run.folder / "tracks.npz")
    height, width = images[0].shape[:2]
    assert tracks.tracks.shape[1:] == (len(images), 2) and len(tracks.tracks) > 0
    for array in (tracks.tracks, tracks.sigma, tracks.visibility):
        assert np.isfinite(array).all()
    assert (tracks.sigma > 0).all() and ((0 <= tracks.visibility) & (tracks.visibility <= 1)).all()
    # Far outside of the frame nothing can have been measured.
    reach = 2 * max(height, width)
    assert (np.abs(tracks.tracks) < reach + np.array([width, height])).all()
    query = tracks.query_points
    at_query = tracks.tracks[np.arange(len(query)), query[:, 0].astype(int)]
    np.testing.assert_allclose(at_query, query[:, :0:-1], atol=0.01)
    for view in ("overlay.mp4", "color.mp4", "depth.mp4"):
        assert len(iio.imread(run.folder / view, plugin="pyav")) >= 1
    SENSIBLE.get(name, lambda run, tracks: None)(run, tracks)
