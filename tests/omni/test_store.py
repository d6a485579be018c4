import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch

from omni.errors import DamagedError, OmniError
from omni.maths.quantisation import (
    Evidence,
    decode_flow,
    encode_flow,
    pack_evidence,
    unpack_evidence,
)
from omni.store import FORMAT_VERSION, Store

ARRAYS = {"a": ((4, 3), np.float32), "b": ((4,), np.uint8)}


class Stopped(Exception):
    pass


def write_items(run, key, items, arrays=ARRAYS, stop=False):
    """Write `items` of a stage; returns which were found done."""
    try:
        with Store(run).stage("one", key, arrays, 4) as stage:
            found = np.flatnonzero(stage.done).tolist()
            for item in items:
                for array in stage.arrays.values():
                    array[item] = item + 1
                stage.mark(item)
            if stop:
                raise Stopped
    except Stopped:
        pass
    return found


def test_an_interrupted_stage_keeps_its_done_items(tmp_path):
    assert write_items(tmp_path, "k", [0, 2], stop=True) == []
    assert not Store(tmp_path).has("one")
    assert not (tmp_path / "store" / "a.npy").exists()
    assert write_items(tmp_path, "k", [1, 3]) == [0, 2]
    assert Store(tmp_path).has("one", "k")
    written = np.load(tmp_path / "store" / "a.npy")
    assert written.tolist() == [[i + 1] * 3 for i in range(4)]
    assert np.load(tmp_path / "store" / "b.npy").tolist() == [1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["a.npy", "b.npy"]


@pytest.mark.parametrize(
    "key, arrays", [("other", ARRAYS), ("k", {**ARRAYS, "a": ((4, 5), np.float32)})]
)
def test_unfinished_work_of_another_key_or_shape_is_discarded(tmp_path, key, arrays):
    write_items(tmp_path, "k", [0, 2], stop=True)
    assert write_items(tmp_path, key, [1], arrays) == []
    assert np.load(tmp_path / "store" / "b.npy").tolist() == [0, 2, 0, 0]


def test_unfinished_work_whose_array_is_lost_is_discarded(tmp_path):
    write_items(tmp_path, "k", [0, 2], stop=True)
    (tmp_path / "store" / "a.partial.npy").unlink()
    assert write_items(tmp_path, "k", [], stop=True) == []


def test_redoing_a_stage_does_not_touch_the_finished_file_until_it_is_done(tmp_path):
    write_items(tmp_path, "k", range(4))
    write_items(tmp_path, "new", [0], stop=True)
    assert np.load(tmp_path / "store" / "b.npy").tolist() == [1, 2, 3, 4]
    assert not Store(tmp_path).has("one")


def test_a_finished_stage_belongs_to_its_key_and_needs_its_whole_files(tmp_path):
    write_items(tmp_path, "k", range(4))
    store, path = Store(tmp_path), tmp_path / "store" / "a.npy"
    assert store.has("one") and store.has("one", "k")
    assert not store.has("one", "other") and not store.has("two")
    path.write_bytes(path.read_bytes()[:-1])
    assert not store.has("one", "k")
    path.unlink()
    assert not store.has("one", "k")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stages": 3}', '{"format_version": 1}', "\xff"])
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(OmniError, match="manifest.json is damaged"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("frames", {"cuts": None}),
        ("frames", {"cuts": [-1]}),
        ("frames", {"cuts": [1.5]}),
        ("frames", {"cuts": [1 << 70]}),
        ("flow", {"provider": 3}),
        ("flow", {"provider": ["dis"]}),
        ("flow", {"pairs": [[0, 1, 2]]}),
        ("flow", {"pairs": [0, 1]}),
        ("flow", {"pairs": [[0, True]]}),
        ("evidence", {"sigma": {"one": [0.3, 0.6]}}),
        ("evidence", {"sigma": {"01": ["anything"]}}),
        ("evidence", {"sigma": {"9" * 5000: [0.3, 0.6]}}),
        ("evidence", {"sigma": 3}),
        ("video", {"size": [1 << 14, 1 << 14]}),
        ("video", {"size": [0, 4]}),
        ("video", {"fps": "24"}),
    ],
)
def test_what_a_crafted_manifest_notes_is_checked(small_store, tmp_path, stage, changes):
    """With the right checksum."""
    run = shutil.copytree(small_store.run, tmp_path / "run")
    store = Store(run)
    (store.manifest[stage] if stage == "video" else store.meta(stage)).update(changes)
    store.note()
    with pytest.raises(DamagedError, match="manifest.json"):
        Store.open(run)
    if stage != "video":
        assert Store.create(run).manifest["stages"] == {}, "preprocessing starts anew"


def test_a_file_of_a_stage_that_only_older_versions_wrote_is_no_obstacle(small_store, tmp_path):
    """A flow stage had one more array where the flow provider predicted its own errors."""
    run = shutil.copytree(small_store.run, tmp_path / "run")
    path = run / "store" / "doubt.npy"
    np.save(path, np.zeros(small_store.evidence.shape, np.uint8))
    store, data = Store(run), path.read_bytes()
    files = store.manifest["stages"]["flow"]["files"]
    files[path.name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    store.note()
    opened = Store.open(run)
    np.testing.assert_array_equal(opened.flow, small_store.flow)
    np.testing.assert_array_equal(opened.evidence, small_store.evidence)


def outside(tmp_path):
    """A file elsewhere that nothing may touch."""
    path = tmp_path / "elsewhere"
    path.write_bytes(b"keep" * 100)
    return path


@pytest.mark.parametrize("name", ["stage.done", "a.partial.npy", "stage.partial.json", "a.npy"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link_in_the_store(tmp_path, name, link):
    run, victim = tmp_path / "run", outside(tmp_path)
    write_items(run, "k", [0, 2], stop=True)
    planted, folder = run / "store" / name, run / "store"
    if name == "a.npy":  # brought back as the stage's own, had it a header that fits
        (folder / "a.partial.npy").replace(victim)
    elif planted.suffix == ".npy" or name == "stage.done":
        planted.replace(victim)
    before = victim.read_bytes()
    planted.unlink(missing_ok=True)
    link(victim, planted)
    write_items(run, "k", range(4))
    assert victim.read_bytes() == before
    assert Store(run).has("one", "k") and not (folder / "a.npy").is_symlink()


def test_an_item_that_changes_before_its_stage_is_closed_is_not_blessed(tmp_path):
    with pytest.raises(DamagedError, match="was changed while it was written"):
        with Store(tmp_path).stage("one", "k", ARRAYS, 4) as stage:
            for item in range(4):
                stage.mark(item)
            stage.arrays["a"][2] = 7
    assert not Store(tmp_path).has("one")
    assert write_items(tmp_path, "k", [2]) == [0, 1, 3]


def test_a_manifest_of_a_newer_format_is_refused(tmp_path):
    manifest = {"format_version": FORMAT_VERSION + 1, "stages": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OmniError, match="written in format 2"):
        Store(tmp_path)


def test_opening_needs_a_folder_with_finished_preprocessing(tmp_path):
    with pytest.raises(OmniError, match="does not exist"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(OmniError, match="no finished preprocessing"):
        Store.open(tmp_path)


def test_a_damaged_array_is_an_error_that_names_it(tmp_path):
    arrays = {"frames": ((4, 3), np.uint8)}
    write_items(tmp_path, "k", range(4), arrays)
    (tmp_path / "store" / "frames.npy").write_bytes(b"not an array")
    with pytest.raises(OmniError, match="frames.npy cannot be read"):
        _ = Store(tmp_path).frames


def test_a_pickled_array_is_not_loaded(tmp_path):
    (tmp_path / "store").mkdir()
    np.save(tmp_path / "store" / "frames.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(OmniError, match="frames.npy cannot be read"):
        _ = Store(tmp_path).frames


def test_facts_of_the_video_survive_reopening(small_store, scene):
    store = Store.open(small_store.run)
    assert store.num_frames == scene.num_frames and store.fps == 25
    assert (store.size, store.video_size) == (scene.size, (48, 64))
    assert store.pairs.shape == (22, 2) and store.masks is None
    assert store.meta("evidence")["threshold"] == 1.5


def test_writing_to_a_mapped_array_leaves_the_file_alone(small_store):
    store = Store.open(small_store.run)
    before = int(store.frames[0, 0, 0, 0])
    store.frames[0, 0, 0, 0] = before ^ 255
    assert Store.open(small_store.run).frames[0, 0, 0, 0] == before


def test_flow_is_coded_within_half_a_step_and_saturates():
    flow = np.random.default_rng(0).uniform(-1000, 1000, (50, 2)).astype(np.float32)
    assert np.abs(decode_flow(encode_flow(flow)) - flow).max() <= 1 / 64
    extreme = decode_flow(encode_flow(np.array([1e6, -1e6, 1023.9, 0])))
    assert extreme == pytest.approx([1023.97, -1023.97, 1023.9, 0], abs=0.02)


def test_evidence_keeps_flags_and_a_monotone_error_within_a_logarithmic_step():
    error = np.linspace(0, 9, 2001)
    flags = np.arange(2001)
    packed = pack_evidence(Evidence(error, flags % 2 > 0, flags % 3 > 0))
    back = unpack_evidence(packed)
    assert packed.dtype == np.uint8
    assert (back.occluded == (flags % 2 > 0)).all() and (back.valid == (flags % 3 > 0)).all()
    assert (np.diff(back.error) >= 0).all()
    assert (np.abs(back.error - error) <= 0.0296 * (error + 0.25)).all()


def test_errors_that_are_huge_or_missing_saturate():
    error = np.array([50.0, np.inf, np.nan, -1.0])
    back = unpack_evidence(pack_evidence(Evidence(error, error > 0, error > 0))).error
    assert back[:3] == pytest.approx(9.26, abs=0.01) and back[3] == 0


def test_evidence_unpacks_equally_from_numpy_and_torch():
    codes = np.arange(256, dtype=np.uint8)
    ours, theirs = unpack_evidence(codes), unpack_evidence(torch.from_numpy(codes))
    for name in ("error", "occluded", "valid"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name).numpy(), rtol=1e-5, err_msg=name
        )
