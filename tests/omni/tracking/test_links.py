import numpy as np
import pytest
import torch

from omni.maths.coords import pixel_centers, sample_image
from omni.maths.quantisation import decode_flow, encode_flow
from omni.tracking.links import Links, sample_flow

ENCODING = 1 / 64
"""Largest rounding error of a stored flow along one axis, pixels."""

CORNERS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
"""A point and these around it on one layer: bilinear sampling mixes nothing."""


@pytest.fixture(scope="module")
def links(small_store):
    return Links(small_store)


def inner_points(scene, frame, target, square):
    """Points anywhere between pixel centres whose 4 neighbours lie on one layer, in both frames."""
    rng = np.random.default_rng(0)
    xy = rng.uniform([2, 2], [30, 22], (4000, 2)).astype(np.float32)
    moved = scene.move(xy, frame, target, square)
    own = [scene.on_square(xy + corner, frame) == square for corner in CORNERS]
    there = [scene.on_square(moved + corner, target) == square for corner in CORNERS]
    inside = ((moved > 1) & (moved < [31, 23])).all(1)
    return xy[np.all(own + there, axis=0) & inside]


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("source, target", [(0, 1), (5, 1), (2, 4)])
def test_a_link_follows_the_true_motion_between_pixels_and_is_cycle_consistent(
    links, scene, source, target, square
):
    xy = inner_points(scene, source, target, square)
    assert len(xy) > 50
    arrived, error = links.follow(source, target, xy)
    expected = scene.move(xy, source, target, square)
    np.testing.assert_allclose(arrived, expected, atol=1.5 * ENCODING)
    assert np.linalg.norm(expected - xy, axis=1).max() > 0.5
    assert error.max() < 4 * ENCODING


def test_the_error_of_a_link_onto_an_occluder_is_the_motion_between_the_layers(links, scene):
    xy = np.random.default_rng(1).uniform([1, 1], [31, 23], (4000, 2)).astype(np.float32)
    arrived = scene.move(xy, 0, 4, False)
    own = [~scene.on_square(xy + corner, 0) for corner in CORNERS]
    there = [scene.on_square(arrived + corner, 4) for corner in CORNERS]
    xy, arrived = (points[np.all(own + there, axis=0)] for points in (xy, arrived))
    _, error = links.follow(0, 4, xy)
    apart = np.linalg.norm(scene.move(arrived, 4, 0, True) - xy, axis=1)
    assert len(xy) > 20 and apart.min() > 5
    np.testing.assert_allclose(error, apart, atol=4 * ENCODING)


def test_the_fields_of_a_pair_are_its_flow_and_the_reverse(links, small_store):
    index = {tuple(pair): k for k, pair in enumerate(small_store.pairs.tolist())}
    for field, pair in zip(links.fields(4, 2), ((4, 2), (2, 4)), strict=True):
        assert np.array_equal(field, small_store.flow[index[pair]])


def test_only_pairs_stored_both_ways_are_links(write_store, scene, tmp_path):
    pairs = [(0, 1), (1, 0), (1, 2), (0, 2), (2, 0)]
    frames = np.stack([scene.frame(t) for t in range(3)])
    flows = {pair: scene.flow(*pair) for pair in [*pairs, (2, 1)]}
    store = write_store(tmp_path, frames, pairs, flows, evidence_of(pairs, scene.size))
    links = Links(store)
    assert links.gaps == [1, 2] and links.num_frames == 3 and links.size == scene.size
    known = {(i, j) for i in range(-1, 4) for j in range(-1, 4) if links.stored(i, j)}
    assert known == {(0, 1), (1, 0), (0, 2), (2, 0)}


def evidence_of(pairs, size):
    from omni.maths.quantisation import Evidence

    yes, no = np.ones(size, bool), np.zeros(size, bool)
    return {pair: Evidence(np.zeros(size), no, yes) for pair in pairs}


def test_sigma_grows_with_the_cycle_error_by_the_line_in_the_store(links, small_store):
    error = np.array([0, 0.5, 4], np.float32)
    for gap in links.gaps:
        floor, slope = small_store.meta("evidence")["sigma"][str(gap)]
        np.testing.assert_allclose(links.sigma(gap, error), floor + slope * error, rtol=1e-6)
        assert (np.diff(links.sigma(gap, error)) > 0).all()


def test_a_rotation_does_not_stretch_an_error_and_a_zoom_does(write_store, tmp_path):
    size, angle = (40, 40), 0.3
    xy = pixel_centers(size).astype(np.float32) - 20
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    flows = {(0, 1): xy @ turn.T - xy, (1, 2): 0.5 * xy}
    flows |= {(1, 0): -flows[0, 1], (2, 1): -flows[1, 2]}
    frames = np.zeros((3, *size, 3), np.uint8)
    links = Links(write_store(tmp_path, frames, list(flows), flows))
    points = np.random.default_rng(4).uniform(12, 28, (50, 2)).astype(np.float32)
    np.testing.assert_allclose(links.stretch(0, 1, points), 1, atol=0.03)
    np.testing.assert_allclose(links.stretch(1, 2, points), 1.5, atol=0.03)


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (7, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("stored", [True, False])
def test_sampling_is_bilinear_and_holds_the_border_value(shape, stored):
    rng = np.random.default_rng(2)
    flow = rng.uniform(-30, 30, (*shape, 2)).astype(np.float32)
    flow = decode_flow(encode_flow(flow))
    xy = rng.uniform([-3, -3], [shape[1] + 3, shape[0] + 3], (300, 2)).astype(np.float32)
    xy = np.concatenate([xy, pixel_centers(shape).reshape(-1, 2), [[0, 0], [shape[1], shape[0]]]])
    xy = xy.astype(np.float32)
    expected = sample_image(torch.from_numpy(flow), torch.from_numpy(xy)).numpy()
    given = encode_flow(flow) if stored else flow
    np.testing.assert_allclose(sample_flow(given, xy), expected, atol=1e-4)


@pytest.mark.parametrize("stored", [True, False])
def test_sampling_reads_views_that_are_not_contiguous(stored):
    flow = np.random.default_rng(3).uniform(-9, 9, (8, 10, 2)).astype(np.float32)
    flow = encode_flow(flow) if stored else flow
    view, xy = flow[::2, ::-1], np.array([[1.7, 2.2], [9.5, 0.5]], np.float32)
    assert np.array_equal(sample_flow(view, xy), sample_flow(view.copy(), xy))


def test_no_points_give_no_motion(links):
    arrived, error = links.follow(0, 1, np.zeros((0, 2), np.float32))
    assert arrived.shape == (0, 2) and error.shape == (0,)
