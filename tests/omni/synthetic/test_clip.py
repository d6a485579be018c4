import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from omni.errors import OmniError
from omni.evaluation.truth import load_truth
from omni.maths.coords import grid_queries
from omni.synthetic.clip import make_clip
from omni.synthetic.scenes import SCENES
from omni.synthetic.surfaces import Camera, Ellipsoid, Joint, Ripple, Sheet
from omni.synthetic.surfaces import Path as Motion
from omni.synthetic.textures import noise
from omni.video.source import open_video

ROOT = Path(__file__).resolve().parents[3]
SIZE = (72, 96)
FRAMES = 8


@pytest.fixture(scope="module")
def clips():
    return {name: make_clip(name, FRAMES, SIZE, seed=3) for name in SCENES}


def colors_at(image, xy):
    """Bilinear colours of (H, W, 3) at raster points (N, 2)."""
    where = xy.T[::-1] - 0.5
    channels = [map_coordinates(image[..., c].astype(float), where, order=1) for c in range(3)]
    return np.stack(channels, axis=-1)


@pytest.mark.parametrize("name", list(SCENES))
def test_track_at_the_query_time_is_the_query_point_and_visible(clips, name):
    rng = np.random.default_rng(0)
    queries = np.concatenate([rng.integers(0, FRAMES, (150, 1)), rng.random((150, 2)) * SIZE], 1)
    tracks, visible = clips[name].track(queries)
    at = queries[:, 0].astype(int)
    np.testing.assert_allclose(tracks[np.arange(150), at], queries[:, :0:-1], atol=1e-6)
    assert visible[np.arange(150), at].all()
    assert tracks.shape == (150, FRAMES, 2) and visible.shape == (150, FRAMES)


@pytest.mark.parametrize("name", list(SCENES))
def test_following_a_track_back_from_any_visible_frame_gives_the_same_track(clips, name):
    clip = clips[name]
    tracks, visible = clip.track(grid_queries(SIZE, 0, 16))
    for t in (3, FRAMES - 1):
        seen = visible[:, t]
        again = np.column_stack([np.full(seen.sum(), t), tracks[seen, t, ::-1]])
        back, back_visible = clip.track(again)
        # A point on the very silhouette may land on either side of it.
        same = np.abs(back - tracks[seen]).max(axis=(1, 2)) < 1e-3
        assert same.mean() > 0.98
        assert (back_visible == visible[seen])[same].mean() > 0.99


@pytest.mark.parametrize("name", list(SCENES))
def test_flow_is_the_displacement_of_tracks_and_valid_where_they_stay_visible(clips, name):
    clip = clips[name]
    assert clip.flow_fwd.shape == (FRAMES - 1, *SIZE, 2)
    for t in (0, 4):
        queries = grid_queries(SIZE, t, 7)
        tracks, visible = clip.track(queries)
        row, column = np.floor(queries[:, 1:]).astype(int).T
        moved = tracks[:, t + 1] - tracks[:, t]
        np.testing.assert_allclose(clip.flow_fwd[t, row, column], moved, atol=1e-3)
        np.testing.assert_array_equal(clip.flow_valid[t, row, column], visible[:, t + 1])
    assert np.abs(clip.flow_fwd).max() > 0.3, "nothing moves"


@pytest.mark.parametrize("name", ["demo", "cloth", "bars", "blocks"])
def test_visible_tracks_keep_their_colour(clips, name):
    """Shading and shadows change colours slowly, interpolation blurs: hence the median."""
    clip = clips[name]
    queries = grid_queries(SIZE, 2, 3)
    tracks, visible = clip.track(queries)
    first = colors_at(clip.video[2], queries[:, :0:-1])
    later = colors_at(clip.video[6], tracks[:, 6])
    seen = visible[:, 6]
    still = colors_at(clip.video[6], queries[:, :0:-1])
    error = np.abs(later - first)[seen].mean(-1)
    assert np.median(error) < 6
    assert error.mean() < 0.65 * np.abs(still - first)[seen].mean(), "no better than no motion"


@pytest.mark.parametrize("name", ["bars", "demo", "cloth", "blocks"])
def test_hidden_exactly_where_something_else_covers_the_point(clips, name):
    """Background tracks are hidden where the segmentation is an object, and nowhere else."""
    clip = clips[name]
    tracks, visible = clip.track(grid_queries(SIZE, 0, 3))
    row, column = np.floor(grid_queries(SIZE, 0, 3)[:, 1:]).astype(int).T
    background = clip.segmentation[0, row, column] == 0
    covered = uncovered = 0
    for t in range(1, FRAMES):
        xy = tracks[background, t]
        in_frame = ((xy > 1) & (xy < np.array(SIZE[::-1]) - 1)).all(-1)
        x, y = np.floor(xy[in_frame]).astype(int).T
        # Compare only where all nine pixels about the point agree: labels are of pixel centres.
        around = np.stack(
            [clip.segmentation[t, y + dy, x + dx] > 0 for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        )
        seen = visible[background, t][in_frame]
        assert not seen[around.all(0)].any()
        assert seen[~around.any(0)].all()
        covered, uncovered = covered + around.all(0).sum(), uncovered + seen.sum()
    assert covered > (0 if name == "bars" else 10) and uncovered > 100
    outside = (tracks < 0).any(-1) | (tracks > SIZE[::-1]).any(-1)
    assert not visible[outside].any()


def test_same_seed_gives_the_same_bytes_and_another_seed_another_clip():
    first, again, other = (make_clip("bars", 2, (32, 48), seed) for seed in (5, 5, 6))
    assert first.video.tobytes() == again.video.tobytes()
    assert (first.video != other.video).mean() > 0.5


def test_an_open_shutter_blurs_the_picture_and_leaves_the_motion_alone():
    still, own, blurred = (make_clip("blocks", 2, SIZE, 3, shutter) for shutter in (0.0, None, 0.9))
    np.testing.assert_array_equal(still.video, own.video)
    assert own.scene.shutter == 0 and blurred.scene.shutter == 0.9
    edges = [np.abs(np.diff(clip.video.astype(float), axis=2)).mean() for clip in (own, blurred)]
    assert edges[1] < edges[0]
    np.testing.assert_array_equal(own.flow_fwd, blurred.flow_fwd)


def test_camera_projects_its_own_rays_back_and_marks_points_behind():
    camera = Camera(SIZE, Motion((0.3, 0.1, 0)), Motion((0.2, -0.4, 0.1)), focal=0.8, zoom=1.01)
    xy = np.random.default_rng(0).random((50, 2)) * SIZE[::-1]
    origin, directions = camera.rays(xy, 7)
    back, depth = camera.project(origin + 3.0 * directions, 7)
    np.testing.assert_allclose(back, xy, atol=1e-9)
    np.testing.assert_allclose(depth, 3.0)
    assert np.isnan(camera.project(origin - directions, 7)[0]).all()


def test_ripple_inverts_to_rounding_and_refuses_to_fold():
    ripple = Ripple((((0.1, 0.05), (3, 1), 0.3, 1.0), ((0.05, -0.1), (1, 2.5), 0.2, 0.0)))
    u = np.random.default_rng(0).normal(size=(500, 2))
    np.testing.assert_allclose(ripple.inverse(ripple.forward(u, 4.5), 4.5), u, atol=1e-8)
    with pytest.raises(ValueError, match="fold"):
        Ripple((((0.5, 0.5), (3.0, 3.0), 0.0, 0.0),))


def test_normals_are_perpendicular_to_the_surface_and_radius_holds_it():
    texture = noise(np.random.default_rng(0), [(0, 0, 0), (1, 1, 1)])
    pulse = (((0.1, -0.1, 0.05), 10, 0.5),)
    ball = Ellipsoid(
        texture,
        Motion((0.1, 0.2, 4)),
        Motion((0.1, 0.5, 0), (0.1, 0, 0)),
        radii=Motion((0.5, 0.8, 0.6), waves=pulse),
    )
    rays = np.random.default_rng(1).normal(size=(4000, 3)) * (0.2, 0.2, 0) + (0, 0, 1)
    for t in range(12):
        depth, material = ball.hit(np.zeros(3), rays, t)
        met = np.isfinite(depth)
        material, points = material[met], rays[met] * depth[met, None]
        np.testing.assert_allclose(ball.locate(material, t), points, atol=1e-9)
        assert np.linalg.norm(points - ball.place(t), axis=1).max() <= ball.radius
        normal = ball.normal(material, t)
        for step in np.eye(3) * 1e-6:
            near = material + step - (material @ step)[:, None] * material
            along = ball.locate(near / np.linalg.norm(near, axis=1, keepdims=True), t) - points
            assert np.abs((along * normal).sum(-1)).max() < 1e-10


def test_every_bounded_sheet_lies_within_its_radius():
    """A larger cut-out would be clipped where rays are skipped, and tracks would disagree."""
    for name, scene in SCENES.items():
        for surface in scene(SIZE, np.random.default_rng(0)).objects:
            if isinstance(surface, Sheet) and np.isfinite(surface.extent):
                u = np.random.default_rng(1).uniform(-3, 3, (20000, 2))
                u = u[surface.covers(u)]
                for t in range(0, 40, 3):
                    reach = np.linalg.norm(surface.ripple.forward(u, t), axis=1).max()
                    assert reach <= surface.radius, name


def test_saved_clip_has_the_evaluation_format_and_loads_as_truth(clips, tmp_path):
    clip = clips["demo"]
    clip.save_clip(tmp_path / "demo.npz", points=40)
    with np.load(tmp_path / "demo.npz", allow_pickle=False) as data:
        shapes = {key: (data[key].shape, data[key].dtype.name) for key in data.files}
    dense = (SIZE[0] // 4) * (SIZE[1] // 4)
    assert shapes["video"] == ((FRAMES, *SIZE, 3), "uint8")
    assert shapes["tracks"] == ((40, FRAMES, 2), "float32")
    assert shapes["visible"] == ((40, FRAMES), "bool")
    assert shapes["query_points"] == ((40, 3), "float32")
    assert shapes["dense_tracks"] == ((dense, FRAMES, 2), "float32")
    assert shapes["dense_visible"] == ((dense, FRAMES), "bool")
    assert shapes["dense_query"] == ((dense, 3), "float32")
    assert shapes["segmentation"] == ((FRAMES, *SIZE), "uint8")
    assert shapes["flow_fwd"] == ((FRAMES - 1, *SIZE, 2), "float16")
    assert shapes["flow_valid"] == ((FRAMES - 1, *SIZE), "bool")
    truth = load_truth(tmp_path / "demo.npz")
    assert tuple(truth.size) == SIZE and len(truth.tracks) == 40


def test_unknown_scene_and_single_frame_are_refused():
    with pytest.raises(OmniError, match="no synthetic scene 'dmeo'.*demo"):
        make_clip("dmeo")
    with pytest.raises(OmniError, match="at least 2 frames"):
        make_clip("demo", frames=1)


def test_make_demo_writes_a_video_and_truth_that_fit_together(tmp_path, monkeypatch):
    script = str(ROOT / "scripts" / "make_demo.py")
    options = ["--frames", "5", "--size", "48x64"]
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "out"), *options])
    runpy.run_path(script, run_name="__main__")
    source = open_video(tmp_path / "out" / "demo.mp4")
    truth = load_truth(tmp_path / "out" / "demo_truth.npz")
    assert source.size == tuple(truth.size) == (48, 64)
    assert truth.tracks.shape[1] == source.num_frames == 5
    assert (truth.query_points[:, 0] == 0).any() and len(np.unique(truth.query_points[:, 0])) == 4
    expected = make_clip("demo", 5, (48, 64)).video
    error = np.abs(np.stack(list(source)).astype(float) - expected)
    assert error.mean() < 6, "the encode loses too much"


def test_what_hangs_on_a_joint_goes_and_turns_with_what_it_hangs_on():
    hip = Motion((1, 2, 3), (0.1, 0, 0))
    knee = Joint(hip, Motion(waves=(((0, 0, 0.5), 20, 0),)), (0, 1, 0))
    foot = Joint(knee, Motion(), (0, 2, 0))
    angle = 0.5 * np.sin(2 * np.pi * 3 / 20)
    bent = np.array([1.3 - np.sin(angle), 2 + np.cos(angle), 3])
    np.testing.assert_allclose(knee(3), bent)
    np.testing.assert_allclose(foot(3), bent + (0, 2, 0))
