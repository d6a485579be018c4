import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from omni.config import FlowConfig
from omni.errors import OmniError
from preprocess.flow.registry import accepts, resolve_provider
from preprocess.flow.weights import PUBLISHED


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return raft_small(weights=None).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(network.state_dict(), path)
    return path


def small_raft(weights):
    return resolve_provider(FlowConfig("raft", weights=str(weights), raft="small"), "cpu")


def images(size):
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (2, *size, 3), dtype=np.uint8)


def test_split_network_equals_torchvision_forward(network, weights):
    first, second = images((128, 136))
    batches = (torch.from_numpy(i).movedim(-1, 0)[None] / 127.5 - 1 for i in (first, second))
    with torch.no_grad():
        expected = network(*batches, num_flow_updates=20)[-1][0].movedim(0, -1).numpy()
    provider = small_raft(weights)
    np.testing.assert_allclose(provider.estimate(first, second), expected, atol=1e-3)
    again = provider.estimate(first, second)  # from cached features
    np.testing.assert_allclose(again, expected, atol=1e-3)


def test_initial_flow_enters_the_result_in_full_resolution_pixels(weights):
    """Random weights change the flow little, so that the initial flow shows."""
    first, second = images((128, 128))
    provider = small_raft(weights)
    flow_init = np.broadcast_to(np.float32([16, -8]), (128, 128, 2)).copy()
    moved = provider.estimate(first, second, flow_init) - provider.estimate(first, second)
    np.testing.assert_allclose(np.median(moved, axis=(0, 1)), [16, -8], atol=4)


def test_small_and_odd_sizes_are_padded(weights):
    flow = small_raft(weights).estimate(*images((50, 67)), np.zeros((50, 67, 2), np.float32))
    assert flow.shape == (50, 67, 2) and flow.dtype == np.float32


def test_safetensors_hold_the_same_weights(network, weights, tmp_path):
    path = tmp_path / "small.safetensors"
    save_file(network.state_dict(), path)
    pair = images((128, 128))
    np.testing.assert_array_equal(
        small_raft(path).estimate(*pair), small_raft(weights).estimate(*pair)
    )


@pytest.mark.parametrize("content", [b"", b"no weights"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_weights_are_named(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(OmniError, match="bad.*RAFT-small"):
        small_raft(path)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"layer": torch.zeros(3)}, path)
    with pytest.raises(OmniError, match="does not hold"):
        small_raft(path)


def test_missing_weights_file_is_named(tmp_path):
    with pytest.raises(OmniError, match="nowhere.pth is not a file"):
        small_raft(tmp_path / "nowhere.pth")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and an empty torch cache (returned)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path / "hub" / "checkpoints"


def test_without_any_weights_one_sentence_says_what_to_do(offline):
    with pytest.raises(OmniError, match="neither cached.*flow.weights, or use flow.provider=dis"):
        resolve_provider(FlowConfig("raft"), "cpu")


def test_auto_falls_back_to_dis_without_any_weights(offline, caplog):
    caplog.set_level("INFO", "preprocess")
    assert resolve_provider(FlowConfig("auto"), "cuda").name == "dis-wide"
    assert "flow: DIS (RAFT weights are neither cached" in caplog.text


def test_weights_are_the_given_else_torchvisions(offline, weights, caplog):
    """The two are different networks, distinguished by their names."""
    caplog.set_level("INFO", "preprocess")
    offline.mkdir(parents=True)
    torch.manual_seed(1)
    cached = offline / PUBLISHED["raft-small"].place().name
    torch.save(raft_small(weights=None).state_dict(), cached)

    def resolved(**flow):
        caplog.clear()
        return resolve_provider(FlowConfig("raft", **flow), "cpu").name, caplog.text

    first, log = resolved(raft="small")
    assert first.startswith("raft-small-") and "RAFT-small, cache weights" in log
    second, log = resolved(raft="small", weights=str(weights))
    assert second.startswith("raft-small-") and second != first and "given weights" in log
    assert accepts(FlowConfig("raft", raft="small"), first)
    assert not accepts(FlowConfig("raft", weights=str(weights), raft="small"), first)


def test_a_batch_gives_what_its_pairs_give_alone(weights):
    draw = np.random.default_rng(2)
    frames = draw.integers(0, 256, (3, 50, 67, 3), dtype=np.uint8)
    flow_init = draw.normal(size=(50, 67, 2)).astype(np.float32)
    pairs = [(frames[0], frames[1], flow_init), (frames[1], frames[2], None)]
    provider = small_raft(weights)
    together = provider.estimate_batch(pairs)
    for flow, pair in zip(together, pairs, strict=True):
        (alone,) = provider.estimate_batch([pair])
        assert flow.shape == (50, 67, 2)
        np.testing.assert_allclose(flow, alone, atol=2e-3)
    np.testing.assert_array_equal(alone, provider.estimate(*pairs[1]))


def test_auto_takes_dis_on_a_cpu(weights):
    provider = resolve_provider(FlowConfig("auto", weights=str(weights), raft="small"), "cpu")
    assert provider.name == "dis-wide"


def test_auto_keeps_finished_flow_of_either_kind():
    assert accepts(FlowConfig("auto"), "raft-large-0123abcd")
    assert accepts(FlowConfig("auto"), "dis-wide")
    assert not accepts(FlowConfig("auto"), "dis")
    assert not accepts(FlowConfig("auto", raft="small"), "raft-large-0123abcd")
    assert not accepts(FlowConfig("dis"), "raft-large-0123abcd")
    assert not accepts(FlowConfig("raft"), "dis-wide")


def test_finished_flow_of_a_weights_file_that_is_gone_is_kept_with_a_warning(tmp_path, caplog):
    for provider in ("raft", "auto"):
        flow = FlowConfig(provider, weights=str(tmp_path / "gone.pth"), raft="small")
        assert accepts(flow, "raft-small-0123abcd")
        assert "gone.pth is gone: keeping finished raft-small-0123abcd" in caplog.text
        caplog.clear()
        assert not accepts(flow, "raft-large-0123abcd")
        assert accepts(flow, "dis-wide") == (provider == "auto")
        assert not caplog.text


def test_memory_that_runs_out_halves_the_batch_for_good(weights, monkeypatch, caplog):
    frames = np.random.default_rng(3).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    pairs = [(frames[t], frames[t + 1], None) for t in range(5)]
    provider = small_raft(weights)
    expected = provider.estimate_batch(pairs)
    forward, counts = provider._network.forward, []

    def small(features, *rest):
        counts.append(len(features))
        if len(features) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(features, *rest)

    monkeypatch.setattr(provider._network, "forward", small)
    for _ in range(2):
        for flow, same in zip(provider.estimate_batch(pairs), expected, strict=True):
            np.testing.assert_allclose(flow, same, atol=2e-3)
    assert counts == [5, 2, 2, 1, 2, 2, 1]
    assert caplog.text.count("out of memory: continuing with RAFT batches of 2 pairs") == 1


def test_one_pair_too_large_for_memory_fails_after_dropping_the_cached_frames(weights, monkeypatch):
    provider, tries = small_raft(weights), []
    frames = np.random.default_rng(3).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    provider.estimate(*frames[:2])

    def never(*_):
        tries.append(len(provider._encoded))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(provider._network, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        provider.estimate(*frames[2:])
    assert tries == [4, 2]


@pytest.mark.parametrize(("size", "room"), [((64, 64), 8), ((480, 854), 6), ((1080, 1920), 1)])
def test_correlation_bounds_how_many_pairs_are_computed_at_once(weights, size, room):
    assert small_raft(weights)._room(size) == room


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_gpu_gives_nearly_the_flow_of_a_cpu(weights):
    first, second = images((128, 160))
    exact, half = (
        resolve_provider(FlowConfig("raft", weights=str(weights), raft="small"), device)
        for device in ("cpu", "cuda")
    )
    expected = exact.estimate(first, second)
    found = half.estimate_batch([(first, second, None)] * 3)
    error = np.linalg.norm(np.array(found) - expected, axis=-1).mean()
    assert error < 0.05 * np.linalg.norm(expected, axis=-1).mean()
