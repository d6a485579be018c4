import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni.maths.coords import (
    denormalize,
    grid_queries,
    inside,
    normalize,
    pixel_centers,
    processing_size,
    rescale,
    sample_image,
)

SIZE = (24, 32)
CORNERS = [[0.0, 0.0], [32.0, 0.0], [0.0, 24.0], [32.0, 24.0]]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_frame_corners_are_exactly_plus_minus_one(kind):
    expected = [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    assert normalize(kind(CORNERS), SIZE).tolist() == expected
    assert denormalize(kind(expected), SIZE).tolist() == CORNERS
    assert type(normalize(kind(CORNERS), SIZE)) is type(kind([0]))


@given(st.floats(-100, 100), st.floats(-100, 100), st.integers(1, 500), st.integers(1, 500))
def test_normalize_and_rescale_are_inverted_by_their_inverses(x, y, height, width):
    xy, size = np.array([x, y]), (height, width)
    assert np.allclose(denormalize(normalize(xy, size), size), xy, atol=1e-9)
    assert np.allclose(rescale(rescale(xy, size, (7, 9)), (7, 9), size), xy, atol=1e-9)


def test_pixel_centers_lie_half_a_pixel_in_and_strided_grids_are_centred():
    centers = pixel_centers(SIZE)
    assert centers.shape == (24, 32, 2) and centers[3, 5].tolist() == [5.5, 3.5]
    strided = pixel_centers((8, 12), stride=4)
    assert strided[..., 0].tolist() == [[2, 6, 10]] * 2 and strided[0, 0, 1] == 2


def test_queries_are_time_row_column():
    queries = grid_queries((8, 12), 2.5, 4)
    assert queries.shape == (6, 3) and queries[1].tolist() == [2.5, 2, 6]


def test_inside_counts_the_edges_and_nothing_beyond():
    points = np.array([*CORNERS, [-0.01, 5], [5, 24.01], [32.01, 5]])
    assert inside(points, SIZE).tolist() == [True] * 4 + [False] * 3


def test_sample_image_agrees_with_the_raster_convention():
    image = torch.from_numpy(pixel_centers(SIZE))
    at_centers = torch.tensor([[5.5, 3.5], [31.5, 23.5]])
    between = torch.tensor([[6.0, 3.75], [10.2, 11.9]])
    beyond = torch.tensor([[-4.0, 3.5], [40.0, 30.0]])
    assert torch.allclose(sample_image(image, at_centers), at_centers, atol=1e-4)
    assert torch.allclose(sample_image(image, between), between, atol=1e-4)
    assert torch.allclose(sample_image(image, beyond), torch.tensor([[0.5, 3.5], [31.5, 23.5]]))


def test_processing_size_shrinks_the_short_side_and_never_enlarges():
    assert processing_size((480, 854), 240) == (240, 427)
    assert processing_size((854, 480), 240) == (427, 240)
    assert processing_size((480, 854), 0) == processing_size((480, 854), 1000) == (480, 854)
    assert processing_size((1, 5000), 1) == (1, 5000)
