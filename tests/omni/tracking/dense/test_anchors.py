import numpy as np
import pytest

from omni.tracking.dense.anchors import anchor_grid, anchor_stage, answer_anchors
from omni.tracking.readout import Reader


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
    assert anchor_grid((16, 256))[0].shape == (8, 128, 2), "but not below two pixels"


@pytest.fixture
def reader(fitted, monkeypatch):
    """Answers its anchors row by row."""
    monkeypatch.setattr("omni.tracking.dense.anchors.AT_ONCE", 1)
    return Reader(fitted.trainer.store, fitted.trainer.field.eval(), chunk=4096)


def test_interrupted_anchors_are_continued_and_finished_ones_read(reader, tmp_path, monkeypatch):
    def stage(key="key", folder=tmp_path):
        return anchor_stage(folder, key, reader.size, reader.num_frames)

    (tmp_path / "whole").mkdir()
    whole = answer_anchors(reader, 1, stage(folder=tmp_path / "whole"))
    rows, calls, select = whole.rows, [], reader.select
    assert rows >= 4

    def interrupted(queries):
        calls.append(queries)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return select(queries)

    monkeypatch.setattr(reader, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_anchors(reader, 1, stage())
    assert stage().done.tolist() == [True] * 2 + [False] * (rows - 2)
    finished = []
    continued = answer_anchors(reader, 1, stage(), finished.append)
    assert len(calls) == 3 + rows - 2 and sum(finished) == len(whole.labels)
    again = answer_anchors(reader, 1, stage())
    assert len(calls) == 3 + rows - 2, "nothing is left to answer"
    for anchors in (continued, again):
        for name, value in vars(whole.selected).items():
            np.testing.assert_array_equal(getattr(anchors.selected, name), value)
    assert not stage("another key").done.any()


def test_anchors_damaged_on_disk_are_answered_again(reader, tmp_path):
    def stage():
        return anchor_stage(tmp_path, "key", reader.size, reader.num_frames)

    first = answer_anchors(reader, 1, stage())
    (file,) = tmp_path.glob("*.npy")
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(data)
    assert stage().done.tolist() == [True] * (first.rows - 1) + [False]
    second = answer_anchors(reader, 1, stage())
    np.testing.assert_array_equal(second.selected.sigma, first.selected.sigma)
