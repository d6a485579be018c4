import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omni.config import FlowConfig
from omni.errors import OmniError
from preprocess.flow.gmflow import GMFlow, GmFlow, provider
from preprocess.flow.registry import accepts, resolve_provider
from preprocess.flow.weights import Weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small file would do for most, but the network has one size."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "gmflow.safetensors"
    save_file(GMFlow().state_dict(), path)
    return path


@pytest.fixture
def gmflow(weights):
    return GmFlow(Weights(weights, "gmflow", "given"))


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 34, 50, 3), dtype=np.uint8)


def test_flow_has_the_size_and_pixels_of_the_frames(gmflow, frames, monkeypatch):
    """The network sees 64 x 96; a flow of one of its pixels is so many of the frames'."""
    network = gmflow._network

    def shifted(first, second, refine):
        size = 2 * len(first[0]), 2, *(8 * side for side in first[0].shape[-2:])
        assert size[2:] == (64, 96)
        return torch.tensor([9.6, 6.4]).view(2, 1, 1).expand(size)

    monkeypatch.setattr(network, "forward", shifted)
    flow = gmflow.estimate(*frames[:2])
    assert flow.shape == (34, 50, 2) and flow.dtype == np.float32
    np.testing.assert_allclose(flow, np.broadcast_to([5.0, 3.4], flow.shape), rtol=1e-5)


def test_both_directions_come_from_one_matching(gmflow, frames, monkeypatch):
    calls, network = [], gmflow._network
    forward = type(network).forward

    def counted(*arguments):
        calls.append(1)
        return forward(network, *arguments)

    monkeypatch.setattr(network, "forward", counted)
    there = gmflow.estimate(frames[0], frames[1])
    back = gmflow.estimate(frames[1], frames[0])
    assert len(calls) == 1 and np.abs(there - back).max() > 0


def test_a_flow_does_not_depend_on_what_was_asked_before(gmflow, frames, weights):
    """Neither on the other direction nor on the initial flow: a run may be interrupted."""
    gmflow.estimate(frames[1], frames[0], np.ones((34, 50, 2), np.float32))
    fresh = GmFlow(Weights(weights, "gmflow", "given")).estimate(frames[0], frames[1])
    np.testing.assert_array_equal(gmflow.estimate(frames[0], frames[1]), fresh)


def test_a_batch_gives_what_its_pairs_give_alone(gmflow, frames):
    pairs = [(frames[0], frames[1], None), (frames[2], frames[1], None)]
    together = gmflow.estimate_batch(pairs)
    for flow, pair in zip(together, pairs, strict=True):
        gmflow._flows.clear()
        np.testing.assert_allclose(flow, gmflow.estimate(*pair), atol=2e-2)


def test_out_of_memory_halves_the_batch(gmflow, frames, monkeypatch):
    network, tries = gmflow._network, []
    forward = type(network).forward

    def scarce(first, second, refine):
        tries.append(len(first[0]))
        if tries[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, first, second, refine)

    monkeypatch.setattr(network, "forward", scarce)
    found = gmflow.estimate_batch([(frames[0], frames[1], None), (frames[1], frames[2], None)])
    assert tries == [2, 1, 1] and len(found) == 2


def test_few_flows_are_kept(gmflow, frames, monkeypatch):
    monkeypatch.setattr(provider, "CACHED_FLOWS", 2)
    gmflow.estimate_batch([(frames[0], frames[1], None), (frames[1], frames[2], None)])
    assert len(gmflow._flows) == 2


@pytest.mark.parametrize(
    "size, expected", [((256, 256), (512, 512)), ((480, 854), (512, 896)), ((1080, 1920), None)]
)
def test_small_frames_are_enlarged(size, expected):
    expected = expected or (1088, 1920)
    assert provider._enlarged_size(size) == expected


@pytest.mark.parametrize("content", [b"", b"no weights"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_weights_are_named(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(OmniError, match="bad.*does not hold GMFlow weights"):
        resolve_provider(FlowConfig("gmflow", weights=str(path)), "cpu")


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"layer": torch.zeros(3)}, path)
    with pytest.raises(OmniError, match="does not hold GMFlow"):
        resolve_provider(FlowConfig("gmflow", weights=str(path)), "cpu")


def test_mixed_is_dis_with_the_global_matching_as_a_further_start(weights, frames, caplog):
    caplog.set_level("INFO", "preprocess")
    config = FlowConfig("mixed", weights=str(weights))
    mixed = resolve_provider(config, "cpu")
    assert "flow: DIS, and GMFlow as a further start, given weights" in caplog.text
    assert mixed.name.startswith("mixed-gmflow-") and accepts(config, mixed.name)
    assert accepts(FlowConfig("mixed"), mixed.name) and not accepts(FlowConfig("mixed"), "dis-wide")
    flow = mixed.estimate(*frames[:2])
    assert flow.shape == (34, 50, 2) and np.isfinite(flow).all()
    assert not mixed._learned._refine


def test_finished_flow_is_kept_by_its_weights(weights, tmp_path):
    config = FlowConfig("gmflow", weights=str(weights))
    name = resolve_provider(config, "cpu").name
    assert name.startswith("gmflow-") and accepts(config, name)
    assert accepts(FlowConfig("gmflow"), name) and not accepts(FlowConfig("gmflow"), "dis-wide")
    assert not accepts(config, "gmflow-01234567") and not accepts(FlowConfig("raft"), name)
