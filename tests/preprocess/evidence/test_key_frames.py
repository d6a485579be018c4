import numpy as np
import pytest

from omni.synthetic import stones
from preprocess.evidence.landmarks import MATCHES, MOST_KEYS, find_features, key_pairs, match


def picture(size=160):
    rng = np.random.default_rng(0)
    texture = stones(rng, [(0.2, 0.3, 0.3), (0.6, 0.5, 0.4), (0.8, 0.7, 0.6)])
    y, x = np.mgrid[:size, :size] / 160
    colors = texture.sample(np.stack([x.ravel(), y.ravel()], -1), np.full(x.size, 1 / 160))
    return (255 * colors.clip(0, 1)).astype(np.uint8).reshape(size, size, 3)


@pytest.mark.parametrize("num_frames", [2, 9, 100, 5000])
def test_key_frames_are_evenly_spaced_and_never_too_many(num_frames):
    pairs = key_pairs(num_frames)
    assert len(pairs) <= MOST_KEYS * (MOST_KEYS - 1) / 2
    assert (pairs[:, 0] < pairs[:, 1]).all() and (pairs < num_frames).all()
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_no_pair_crosses_a_cut():
    pairs = key_pairs(60, cuts=[20, 45])
    assert len(pairs) > 3
    shot = np.searchsorted([20, 45], pairs, "right")
    assert (shot[:, 0] == shot[:, 1]).all()


def test_matches_follow_a_shift_in_raster_coordinates():
    image = picture()
    first, second = image[:120, :120], image[14:134, 23:143]
    found = match(find_features(first), find_features(second))
    assert found.shape == (MATCHES, 4)
    found = found[np.isfinite(found[:, 0])]
    assert len(found) > 30
    shift = found[:, 2:] - found[:, :2]
    assert (np.linalg.norm(shift - [-23, -14], axis=1) < 0.5).mean() > 0.9
    assert np.abs(np.median(shift, axis=0) - [-23, -14]).max() < 0.05


def test_an_image_without_texture_has_no_matches():
    gray = np.full((64, 64, 3), 128, np.uint8)
    assert np.isnan(match(find_features(gray), find_features(picture()))).all()
    assert np.isnan(match(find_features(picture()), find_features(gray))).all()
