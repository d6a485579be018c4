import numpy as np
import pytest

from omni.tracking.dense.anchors import Anchors, anchor_grid
from omni.tracking.selection import Selection


@pytest.mark.parametrize("size, count", [((256, 256), (64, 64)), ((256, 455), (64, 114))])
def test_every_pixel_has_an_anchor_within_half_a_pitch_and_all_lie_in_the_frame(size, count):
    grid, pitch = anchor_grid(size)
    assert grid.shape == (*count, 2) and pitch == 4
    assert (grid > 0).all() and (grid < size[::-1]).all()
    for axis, side in ((0, size[1]), (1, size[0])):
        place = np.unique(grid[..., axis])
        pixels = np.arange(side) + 0.5
        assert np.abs(pixels[:, None] - place).min(1).max() <= pitch / 2


def test_the_pitch_grows_with_the_video():
    assert anchor_grid((512, 512))[0].shape == (64, 64, 2)


@pytest.fixture
def anchors():
    random = np.random.default_rng(0)
    xy, *others = (random.random((6, 4, *tail)).astype(np.float32) for tail in ((2,), (), (), ()))
    return Anchors(3, 4.0, 3, np.arange(6, dtype=np.uint8), Selection(xy, *others))


def test_saved_anchors_are_read_again_with_the_same_key_only(anchors, tmp_path):
    path = tmp_path / "3.npz"
    assert Anchors.load(path, "key") is None
    anchors.save(path, "key")
    loaded = Anchors.load(path, "key")
    assert (loaded.frame, loaded.pitch, loaded.columns, loaded.rows) == (3, 4.0, 3, 2)
    np.testing.assert_array_equal(loaded.labels, anchors.labels)
    for name, value in vars(anchors.selected).items():
        np.testing.assert_array_equal(getattr(loaded.selected, name), value)
    assert Anchors.load(path, "another") is None


def test_damaged_anchors_are_computed_again(anchors, tmp_path):
    path = tmp_path / "3.npz"
    anchors.save(path, "key")
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(data)
        assert Anchors.load(path, "key") is None
    np.savez(path, key="key", xy=np.array([{}], object))
    assert Anchors.load(path, "key") is None
