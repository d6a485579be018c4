import dataclasses

import pytest
import yaml

from omni.config import Config, Term, load_config, presets, to_yaml
from omni.errors import OmniError
from omni.system.schema import apply_settings, digest, to_dict


def test_resolved_yaml_loads_back_to_an_equal_config(tmp_path):
    changes = ["optim.betas=[0.8, 0.95]", "loss.flow.end=0.5", "model.code=gabor", "seed=7"]
    config = load_config("paper", changes)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config != Config()


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_changes_something(name):
    assert load_config(name) != Config()


def test_no_preset_and_no_override_is_the_dataclass_defaults():
    assert load_config() == Config()


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("optim.step=3", "optim.steps"),
        ("sampling.minning=1", "sampling.mining"),
        ("los.flow=1", "loss"),
        ("hidden=3", "model.hidden"),
        ("loss.flow.wieght=1", "loss.flow.weight"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(wrong, nearest):
    with pytest.raises(OmniError, match=f"unknown key .*nearest valid key: {nearest}\\)"):
        load_config("", [wrong])


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("optim.lr_code=3e-5", lambda c: c.optim.lr_code, 3e-5),  # PyYAML reads text
        ("optim.clip=2", lambda c: c.optim.clip, 2.0),
        ("optim.steps=1e4", lambda c: c.optim.steps, 10000),
        ("optim.steps=500.0", lambda c: c.optim.steps, 500),
        ("loss.robust=no", lambda c: c.loss.robust, False),
        ("model.motion=null", lambda c: c.model.motion, "none"),
        ("loss.photometric=2", lambda c: c.loss.photometric, Term(2.0)),
        ("loss.photometric.begin=0.5", lambda c: c.loss.photometric, Term(5.0, 0.5)),
    ],
)
def test_values_are_coerced_by_field_type(override, read, value):
    result = read(load_config("", [override]))
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        "optim.steps=1.5",
        "optim.steps=true",
        "optim.steps=.inf",
        "optim.steps=.nan",
        "optim.lr_code=.nan",
        "optim.lr_code=fast",
        "optim.lr_code=true",
        "optim.betas=[0.9]",
        "optim.betas=0.9",
        "loss.robust=1",
        "loss.robust=maybe",
        "flow.pairs=farneback",
        "flow.weights=3",
        "model=3",
        "model=[1]",
        "loss.flow=[1, 2]",
        "optim.steps",
        "optim.steps=[",
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override):
    with pytest.raises(OmniError):
        load_config("", [override])


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "5", "\x00", "1: 2"])
def test_a_file_that_is_no_mapping_of_keys_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(OmniError) as caught:
        load_config(str(path))
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_names_the_presets():
    with pytest.raises(OmniError, match="nor a preset .*paper"):
        load_config("nothing.yaml")


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {steps: 5, clip: 3}")
    config = load_config(str(path), ["optim.steps=6", "optim.steps=7"])
    assert (config.optim.steps, config.optim.clip) == (7, 3.0)
    assert apply_settings(config, {"optim": {"clip": 4}}, "here").optim.steps == 7


def test_dictionary_is_plain_yaml_and_digest_sees_every_change():
    config = Config()
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)
    other = dataclasses.replace(config, seed=1)
    assert digest(to_dict(config)) == digest(to_dict(Config())) != digest(to_dict(other))


def test_a_setting_that_is_gone_is_read_where_it_changed_nothing_and_refused_where_it_did(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("flow: {refine: true, max_gap: 8}\n")
    assert load_config(str(path)).flow.max_gap == 8
    path.write_text("flow: {refine: false, max_gap: 8}\n")
    with pytest.raises(OmniError, match="flow.refine is always True in this version, not False"):
        load_config(str(path))
    with pytest.raises(OmniError, match="unknown key flow.refine"):
        load_config("", ["flow.refine=true"])


def test_a_value_out_of_range_in_a_file_may_be_set_right_on_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim: {steps: 0}\n")
    with pytest.raises(OmniError, match="optim.steps must lie between 1"):
        load_config(str(path))
    assert load_config(str(path), ["optim.steps=5"]).optim.steps == 5
