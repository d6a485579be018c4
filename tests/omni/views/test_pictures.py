import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import flow_to_image as reference_flow_to_image

from omni.errors import OmniError
from omni.tracking.tracks import Tracks
from omni.views.overlay import draw_tracks, track_colors
from omni.views.pictures import (
    animation_png,
    depth_to_image,
    draw_label,
    error_to_image,
    flow_to_image,
    side_by_side,
)

SIZE = (480, 640)
GREY = 100


def make_tracks(xy, visible=True, size=SIZE) -> Tracks:
    """Tracks (N, T, 2) whose queries are their first positions."""
    xy = np.asarray(xy, np.float32)
    visible = np.broadcast_to(np.asarray(visible), xy.shape[:2]).copy()
    queries = np.concatenate([np.zeros((len(xy), 1)), xy[:, 0, ::-1]], 1).astype(np.float32)
    sigma = np.ones(visible.shape, np.float32)
    return Tracks(xy, visible, visible.astype(np.float32), sigma, queries, size, 24.0)


def grey(num_frames, size=SIZE) -> np.ndarray:
    return np.full((num_frames, *size, 3), GREY, np.uint8)


def changed(image) -> np.ndarray:
    return (image != GREY).any(-1)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("xy", [(100.5, 200.5), (100.3, 200.8), (320.0, 240.0)])
def test_disc_is_centred_on_the_raster_point(xy, scale):
    size = (SIZE[0] * scale, SIZE[1] * scale)
    black = np.zeros((1, *size, 3), np.uint8)
    white = np.full((1, 3), 255, np.uint8)
    (image,) = draw_tracks(black, make_tracks([[xy]]), colors=white)
    # The rim is nearly black, so the weight is the disc.
    weight = image[..., 0].astype(float) * (image[..., 0] > 14)
    rows, columns = np.indices(size)
    centre = [(columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()]
    np.testing.assert_allclose(np.add(centre, 0.5), np.multiply(xy, scale), atol=0.12)


def test_nothing_is_drawn_away_from_the_tracks():
    images = list(draw_tracks(grey(3), make_tracks(np.tile((320.0, 240.0), (1, 3, 1)))))
    for image in images:
        rows, columns = np.nonzero(changed(image))
        assert 0 < len(rows) < 150
        assert np.hypot(rows - 239.5, columns - 319.5).max() < 7


@pytest.mark.parametrize("x", [np.nan, np.inf, -1e9, 1e9, 1e30])
def test_points_far_outside_or_not_finite_are_harmless(x):
    xy = np.full((1, 4, 2), 50.0)
    xy[0, 1:3, 0] = x
    images = list(draw_tracks(grey(4), make_tracks(xy)))
    assert not changed(images[2]).any() or np.isfinite(x)
    assert changed(images[3]).any()
    assert not changed(images[2])[100:].any()


def test_no_tracks_leave_the_frames_as_they_are():
    images = list(draw_tracks(grey(2), make_tracks(np.zeros((0, 2, 2)))))
    assert len(images) == 2 and not changed(images[1]).any()


def test_hidden_point_is_hollow_and_visible_one_filled():
    xy = [[(100.5, 100.5)], [(300.5, 100.5)]]
    (image,) = draw_tracks(grey(1), make_tracks(xy, [[True], [False]]))
    drawn = changed(image)
    assert drawn[100, 100] and not drawn[100, 300]
    assert drawn[90:111, 290:311].sum() >= 8


def test_trail_fades_with_age_and_leaves_no_ghost():
    xy = np.stack([np.minimum(20 * np.arange(60), 400) + 20.5, np.full(60, 240.5)], -1)
    images = list(draw_tracks(np.zeros((60, *SIZE, 3), np.uint8), make_tracks(xy[None]), trail=12))
    middles = images[12][240, 30:230:20].max(-1).astype(int)
    assert (np.diff(middles) > 0).all()
    assert middles[-1] > 3 * middles[0] > 0
    assert not images[-1][:, :400].any()


def test_trail_of_a_hidden_point_is_fainter_and_broken():
    xy = np.stack([10.0 * np.arange(12) + 50, np.full(12, 240.5)], -1)[None]
    visible = list(draw_tracks(grey(12), make_tracks(xy)))[-1]
    hidden = list(draw_tracks(grey(12), make_tracks(xy, visible=False)))[-1]
    row = changed(hidden)[240, 60:150]
    assert row.any() and not row.all()
    assert changed(visible)[240, 60:150].all()


def test_trail_0_draws_the_points_alone():
    xy = np.stack([40.0 * np.arange(6) + 50, np.full(6, 240.5)], -1)[None]
    image = list(draw_tracks(grey(6), make_tracks(xy), trail=0))[-1]
    assert not changed(image)[:, :240].any()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((120, 160), (480, 640)), ((256, 256), (512, 512)), ((480, 854), (480, 854))],
)
def test_small_frames_are_enlarged_by_a_whole_factor(size, drawn):
    tracks = make_tracks([[(320.0, 240.0)]])
    (image,) = draw_tracks(grey(1, size), tracks)
    assert image.shape == (*drawn, 3)
    rows, columns = np.nonzero(changed(image))
    # The tracks' video is scaled to the frame, whatever its aspect.
    np.testing.assert_allclose([rows.mean(), columns.mean()], np.array(drawn) / 2 - 0.5, atol=0.3)


@pytest.mark.parametrize("given", [2, 4])
def test_another_number_of_frames_is_an_error(given):
    tracks = make_tracks(np.zeros((1, 3, 2)))
    with pytest.raises(OmniError, match="3"):
        draw_tracks(grey(given), tracks)
    with pytest.raises(OmniError, match="3"):
        list(draw_tracks(iter(grey(given)), tracks))


def test_frames_given_are_not_drawn_on():
    frames = grey(2)
    list(draw_tracks(frames, make_tracks(np.full((1, 2, 2), 50.0))))
    assert not changed(frames).any()


def test_color_of_a_track_does_not_depend_on_the_others():
    points = np.random.default_rng(0).uniform(0, 480, (50, 3)).astype(np.float32)
    colors = track_colors(points, SIZE)
    np.testing.assert_array_equal(track_colors(points[7:9], SIZE), colors[7:9])
    assert colors.dtype == np.uint8 and colors.max(1).min() > 120
    assert len(np.unique(colors, axis=0)) > 45


def test_flow_colors_are_those_of_middlebury():
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    length = np.linspace(0, 8, 50)[:, None]
    flow = np.stack([length * np.cos(angle), length * np.sin(angle)], -1).astype(np.float32)
    reference = reference_flow_to_image(torch.from_numpy(flow).movedim(-1, 0)).movedim(0, -1)
    difference = flow_to_image(flow, max_motion=8).astype(int) - reference.numpy()
    # The reference truncates where we round, and quantises the wheel.
    assert np.abs(difference).max() <= 2


def test_flow_outliers_do_not_wash_out_the_picture():
    flow = np.full((50, 50, 2), 2.0)
    clean = flow_to_image(flow)
    flow[0, 0] = 1e4
    flow[0, 1] = np.nan
    image = flow_to_image(flow)
    np.testing.assert_array_equal(image[1:], clean[1:])
    assert image[0, 1].tolist() == [128, 128, 128]
    assert (flow_to_image(np.zeros((4, 4, 2))) == 255).all()


def test_near_is_bright_and_far_dark():
    depth = np.tile(np.linspace(0, 2, 100), (10, 1))
    depth[0, 50] = 1e6
    light = depth_to_image(depth)[5].astype(int).sum(-1)
    assert (np.diff(light) <= 0).mean() > 0.95
    assert light[0] > 500 and light[-1] < 60


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_depth_and_error_without_range_are_drawn(value):
    field = np.full((6, 8), value)
    assert depth_to_image(field).shape == error_to_image(field).shape == (6, 8, 3)


def test_error_scale_is_the_one_asked_for():
    error = np.array([[0.0, 1.0, 2.0, 50.0, np.nan]])
    image = error_to_image(error, max_error=2.0)[0].astype(int)
    assert image[0].sum() < image[1].sum() < image[2].sum()
    assert image[2].tolist() == image[3].tolist()
    assert image[4].tolist() == [128, 128, 128]


def test_side_by_side_brings_all_to_one_height_and_labels_each():
    images = [np.full((240, 320, 3), 255, np.uint8), np.full((120, 100, 3), 255, np.uint8)]
    plain = side_by_side(images)
    assert plain.shape == (240, 320 + 2 + 200, 3)
    labelled = side_by_side(images, ["flow", "depth"])
    differs = (plain != labelled).any(-1)
    assert differs[:40, :100].any() and differs[:40, 322:].any() and not differs[60:].any()


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_label_is_readable_on_any_background(shade):
    patch = draw_label(np.full((240, 320, 3), shade, np.uint8), "Ag")[:20, :20].astype(int)
    assert patch.max() - patch.min() > 150


def encoded(frames, fps=12.0) -> Image.Image:
    data = animation_png(frames, fps)
    assert len(data) <= 2_000_000
    return Image.open(io.BytesIO(data))


def test_animation_is_a_true_colour_png_that_plays():
    frames = list(draw_tracks(grey(8, (240, 320)), make_tracks(np.arange(16.0).reshape(1, 8, 2))))
    picture = encoded(frames)
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    assert picture.n_frames > 1 and picture.width == 480


def test_heavy_animation_becomes_a_small_gif():
    noise = np.random.default_rng(0).integers(0, 256, (6, 400, 600, 3), np.uint8)
    picture = encoded(
        np.repeat(noise, 5, axis=0) ^ np.arange(30, dtype=np.uint8)[:, None, None, None]
    )
    assert picture.format == "GIF" and picture.n_frames == 30 and picture.width <= 480


def test_long_animation_is_thinned_but_keeps_its_duration():
    frames = np.zeros((90, 20, 30, 3), np.uint8)
    frames[np.arange(90), :, np.arange(90) % 30] = 255
    picture = encoded(frames, fps=30.0)
    assert picture.n_frames == 30
    assert picture.info["duration"] == pytest.approx(100)


def test_one_frame_is_a_still():
    assert encoded(np.zeros((1, 20, 30, 3), np.uint8)).size == (30, 20)
