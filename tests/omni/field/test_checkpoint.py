import io
import os
import zipfile

import numpy as np
import pytest
import torch

from omni.config import Config, ModelConfig
from omni.errors import DamagedError, OmniError
from omni.field.checkpoint import FORMAT_VERSION, load_checkpoint, load_field, save_checkpoint
from omni.field.model.field import Field
from omni.system.schema import to_dict

STATE = {"field": {"w": torch.arange(6.0).view(2, 3)}, "step": 7, "history": [{"mean": 0.5}]}


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    back = load_checkpoint(path)
    assert torch.equal(back["field"]["w"], STATE["field"]["w"])
    assert (back["step"], back["history"]) == (7, [{"mean": 0.5}])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"], "no temporary file is left"


def test_measures_that_older_versions_called_otherwise_get_their_new_names(tmp_path):
    entry = {"step": 5, "mean": 0.5, "astray": 0.25, "in_front": 0.0}
    path, good = tmp_path / "checkpoint.pt", {"step": 5, "history": [dict(entry)]}
    save_checkpoint(path, {"step": 7, "history": [entry, {"mean": 0.4}], "good": good})
    back = load_checkpoint(path)
    expected = {"step": 5, "mean": 0.5, "outliers": 0.25, "in_front": 0.0}
    assert back["history"] == [expected, {"mean": 0.4}] and back["good"]["history"] == [expected]
    assert list(back["history"][0]) == list(expected), "in the order of a new checkpoint"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "executed"
    torch.save({"format_version": FORMAT_VERSION, "field": Evil(marker)}, path)
    with pytest.raises(OmniError, match="checkpoint.pt"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file must be dangerous, else this test proves nothing"


def saved_bytes():
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **STATE}, buffer)
    return buffer.getvalue()


def a_zip_without_a_pickle():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/other", b"x")
    return buffer.getvalue()


def an_array_file():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"not a checkpoint",
        bytes(range(256)) * 40,
        saved_bytes()[:10],
        saved_bytes()[: len(saved_bytes()) // 2],
        saved_bytes()[:-1],
        a_zip_without_a_pickle(),
        an_array_file(),
    ],
    ids=["empty", "byte", "text", "noise", "start", "half", "cut", "zip", "npz"],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(OmniError, match="checkpoint.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "state",
    [
        {"format_version": FORMAT_VERSION + 1},
        {"format_version": torch.ones(2)},
        {"key": torch.ones(2)},
        {"step": 1},
        [1, 2],
        3.0,
    ],
)
def test_another_format_is_refused(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    with pytest.raises(OmniError, match="another version"):
        load_checkpoint(path)


def test_the_error_of_a_missing_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(OmniError, match="does not exist: run"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_field_that_only_declares_its_size_is_not_built(tmp_path):
    """A zero expanded to the shape of a network takes no space in the file."""
    config = Config(model=ModelConfig(couplings=1, hidden=64, grid_levels=1, grid_log2_size=16))
    weights = Field(4, config.model, config.render).state_dict()
    state = {"config": to_dict(config), "num_frames": 4, "step": 1, "field": weights}
    path, cpu = tmp_path / "checkpoint.pt", torch.device("cpu")
    save_checkpoint(path, state)
    assert load_field(path, 4, cpu)[2] == 1
    one = torch.zeros(1)
    for of in (lambda value: torch.zeros(1), lambda value: one):
        empty = {name: of(value).expand(value.shape) for name, value in weights.items()}
        save_checkpoint(path, state | {"field": empty})
        with pytest.raises(DamagedError, match="does not fit itself"):
            load_field(path, 4, cpu)
    for changes in ({"field": one}, {"step": 1.5}, {"step": -1}, {"config": 3}):
        save_checkpoint(path, state | changes)
        with pytest.raises(OmniError, match="checkpoint.pt"):
            load_field(path, 4, cpu)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OmniError, match="cannot write"):
        save_checkpoint(tmp_path / "no" / "folder" / "checkpoint.pt", STATE)
