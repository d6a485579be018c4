import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from omni.config import Config, DataConfig, FlowConfig
from omni.errors import OmniError
from omni.maths.quantisation import decode_flow, unpack_evidence
from omni.store import Store
from preprocess import prepare
from preprocess.flow.raft import RaftFlow
from preprocess.flow.weights import find_weights

NUM_FRAMES, SIZE = 10, (60, 80)


def write_clip(folder, num_frames=NUM_FRAMES, speed=2, seed=0):
    noise = np.random.default_rng(seed).uniform(0, 255, (100, 200, 3)).astype(np.float32)
    image = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    folder.mkdir()
    for t in range(num_frames):
        left = 60 - speed * t
        frame = image[:60, left : left + 80].astype(np.uint8)
        Image.fromarray(frame).save(folder / f"{t:03}.png")
    return folder


def settings(resolution=40, workers=2, max_gap=4, **flow):
    return Config(
        data=DataConfig(resolution=resolution),
        flow=FlowConfig(provider="dis", max_gap=max_gap, workers=workers, **flow),
    )


def contents(run):
    files = sorted(p for p in run.rglob("*") if p.is_file())
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "frames")


@pytest.fixture(scope="module")
def finished(clip, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    prepare(clip, run, settings(), progress=False)
    return run


def test_store_holds_frames_flow_and_evidence_at_processing_size(finished):
    store = Store.open(finished)
    assert store.frames.shape == (10, 40, 53, 3)
    assert store.flow.shape == (46, 40, 53, 2)
    assert store.evidence.shape == (46, 40, 53)
    assert len(store.pairs) == 46 and store.masks is None
    assert (store.video_size, store.num_frames, store.fps) == (SIZE, 10, 24.0)
    assert store.manifest["source"]["name"] == "frames"


def test_flow_measures_the_motion_of_every_gap(finished):
    """The scene moves right by 2 pixels of 80, i.e. 1.325 of 53, per frame."""
    store = Store.open(finished)
    for k, (source, target) in enumerate(store.pairs):
        flow = decode_flow(store.flow[k])[8:-8, 12:-12]
        expected = (target - source) * 2 * 53 / 80
        np.testing.assert_allclose(np.median(flow, axis=(0, 1)), [expected, 0], atol=0.15)


def test_evidence_and_its_statistics_find_the_flow_reliable(finished):
    store = Store.open(finished)
    meta = store.meta("evidence")
    assert [s["gap"] for s in meta["gaps"]] == [1, 2, 4]
    assert all(s["reliable"] > 0.8 and s["median_error"] < 0.2 for s in meta["gaps"])
    assert list(meta["sigma"]) == ["1", "2", "4"]
    assert all(0.005 < floor < 0.3 and 0.4 < slope < 3 for floor, slope in meta["sigma"].values())
    far = unpack_evidence(store.evidence[store.pairs.tolist().index([0, 4])])
    assert not far.valid[:, -4:].any() and far.valid[:, 5:40].all()


def test_result_does_not_depend_on_the_number_of_threads(clip, finished, tmp_path):
    threads = cv2.getNumThreads()
    prepare(clip, tmp_path / "run", settings(workers=1), progress=False)
    assert contents(tmp_path / "run") == contents(finished)
    assert cv2.getNumThreads() == threads


def test_running_again_writes_nothing(clip, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    prepare(clip, finished, settings(), progress=False)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_a_killed_run_continues_to_the_bytes_of_an_uninterrupted_one(clip, finished, tmp_path):
    run = tmp_path / "run"
    code = (
        "from preprocess import prepare; import sys, tests.preprocess.test_pipeline as t\n"
        "import time; from preprocess.flow import DisFlow\n"
        "original = DisFlow.estimate\n"
        "def slow(*a, **k):\n    time.sleep(0.03); return original(*a, **k)\n"
        "DisFlow.estimate = slow\n"
        "prepare(sys.argv[1], sys.argv[2], t.settings(), progress=False)\n"
    )
    kills = 0
    for target in (4, 30):
        command = [sys.executable, "-c", code, str(clip), str(run)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        done = run / "store" / "stage.done"
        while process.poll() is None:
            if (run / "store" / "flow.partial.npy").exists() and marked(done) >= target:
                process.kill()
                kills += 1
                break
            time.sleep(0.003)
        process.wait()
    assert kills == 2 and marked(done) < 46
    prepare(clip, run, settings(), progress=False)
    assert contents(run) == contents(finished)


def marked(path):
    try:
        return np.count_nonzero(np.frombuffer(path.read_bytes(), np.uint64))
    except FileNotFoundError:
        return 0


def test_only_what_a_change_touches_is_redone(clip, tmp_path):
    run = tmp_path / "run"
    prepare(clip, run, settings(), progress=False)

    def times():
        return {p.stem: p.stat().st_mtime_ns for p in (run / "store").iterdir()}

    first = times()
    prepare(clip, run, settings(cycle_threshold=1.0), progress=False)
    second = times()
    assert {n for n in second if second[n] != first[n]} == {"evidence"}
    prepare(clip, run, settings(cycle_threshold=1.0, max_gap=2), progress=False)
    third = times()
    assert {n for n in third if third[n] != second[n]} == {"flow", "evidence"}


def test_another_video_in_the_same_run_folder_leaves_nothing_of_the_old_one(tmp_path):
    run = tmp_path / "run"
    prepare(write_clip(tmp_path / "a", 6), run, settings(), progress=False)
    other = write_clip(tmp_path / "b", 6, speed=1, seed=1)
    prepare(other, run, settings(), progress=False)
    prepare(other, tmp_path / "fresh", settings(), progress=False)
    assert contents(run) == contents(tmp_path / "fresh")


def test_masks_are_stored_and_forbid_links_between_labels(clip, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    label = np.zeros(SIZE, np.uint8)
    label[:, :40] = 255
    Image.fromarray(label).save(masks / "000.png")
    Image.fromarray(255 - label).save(masks / "001.png")
    run = tmp_path / "run"
    store = prepare(clip, run, settings(), masks=masks, progress=False)
    assert store.masks.shape == (10, 40, 53)
    assert set(np.unique(store.masks[0])) == {0, 1}
    assert (store.masks[2:] == 255).all(), "frames without a mask are unknown"
    pairs = store.pairs.tolist()
    assert not unpack_evidence(store.evidence[pairs.index([0, 1])]).valid[:, 5:20].any()
    assert unpack_evidence(store.evidence[pairs.index([0, 2])]).valid[:, 5:20].all()
    assert prepare(clip, run, settings(), progress=False).masks is None


@pytest.mark.parametrize(("pairs", "count"), [("log", 10), ("exhaustive", 12)])
def test_flow_by_raft_is_stored_and_needs_no_weights_once_it_is_finished(tmp_path, pairs, count):
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(raft_small(weights=None).state_dict(), weights)
    flow = FlowConfig("raft", str(weights), "small", pairs=pairs, max_gap=2)
    config = Config(device="cpu", data=DataConfig(resolution=40), flow=flow)
    clip, run = write_clip(tmp_path / "clip", 4), tmp_path / "run"
    store = prepare(clip, run, config, progress=False)
    assert len(store.pairs) == count and store.meta("flow")["provider"].startswith("raft-small-")
    adjacent = decode_flow(store.flow[store.pairs.tolist().index([0, 1])])
    raft = RaftFlow(find_weights("raft-small", str(weights)))
    expected = raft.estimate(*np.array(store.frames[:2]))
    np.testing.assert_allclose(adjacent, expected, atol=0.02)
    before = {p: p.stat().st_mtime_ns for p in (run / "store").iterdir()}
    weights.unlink()  # as after a move to another machine
    prepare(clip, run, config, progress=False)
    assert {p: p.stat().st_mtime_ns for p in (run / "store").iterdir()} == before


def test_no_flow_crosses_a_cut(tmp_path):
    clip = write_clip(tmp_path / "a", 5)
    other = write_clip(tmp_path / "b", 5, seed=7)
    for path in sorted(other.iterdir()):
        path.rename(clip / f"1{path.name}")
    store = prepare(clip, tmp_path / "run", settings(), progress=False)
    assert store.meta("frames")["cuts"] == [5]
    assert ((store.pairs < 5).all(axis=1) | (store.pairs >= 5).all(axis=1)).all()


def test_a_single_frame_is_refused(tmp_path):
    with pytest.raises(OmniError, match="2"):
        prepare(write_clip(tmp_path / "a", 1), tmp_path / "run", settings(), progress=False)


def test_a_one_pixel_wide_video_is_processed(tmp_path):
    clip = tmp_path / "thin"
    clip.mkdir()
    for t in range(3):
        Image.fromarray(np.full((9, 1, 3), 40 * t, np.uint8)).save(clip / f"{t}.png")
    store = prepare(clip, tmp_path / "run", settings(), progress=False)
    assert store.flow.shape == (6, 9, 1, 2)


def test_manifest_names_the_source_without_its_folder(clip, finished):
    text = (finished / "manifest.json").read_text()
    assert str(clip.parent) not in text
    assert json.loads(text)["source"]["fingerprint"]
