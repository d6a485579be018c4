import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import optical_flow

from preprocess.flow.raft.network import FlowNetwork, read_weights


def images(count=2, size=(128, 128)):
    torch.manual_seed(1)
    return torch.rand(count, 3, *size) * 2 - 1


def predict(network, first, second, updates=2):
    features, context = network.encode(torch.cat([first, second]))
    own, other = features.chunk(2)
    return network(own, other, context[: len(first)], updates=updates)


@pytest.fixture(scope="module", params=["small", "large"])
def network(request):
    torch.manual_seed(0)
    network = FlowNetwork(request.param, heads=True)
    torch.nn.init.normal_(network.heads[-1].weight, std=0.1)
    return network.eval()


def test_the_flow_is_torchvisions(network):
    first, second = images(), images().flip(-1)
    with torch.no_grad():
        expected = network.raft(first, second, num_flow_updates=2)[-1]
        found = predict(network, first, second)
    assert len(found.flows) == 1
    torch.testing.assert_close(found.flows[0], expected, atol=1e-3, rtol=0)


def test_mixed_precision_keeps_correlation_exact(network):
    first, second = images(1), images(1).flip(-1)
    with torch.no_grad():
        exact = predict(network, first, second)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = predict(network, first, second)
    assert network.raft.corr_block.corr_pyramid[0].dtype == torch.float32
    assert mixed.flows[0].dtype == mixed.log_variance.dtype == torch.float32
    assert 0 < (mixed.flows[0] - exact.flows[0]).abs().mean() < 0.05 * exact.flows[0].abs().mean()


def test_heads_predict_every_pixel_and_send_no_gradient_into_the_flow(network):
    found = predict(network, images(1), images(1).flip(-1))
    assert found.occlusion.shape == found.log_variance.shape == (1, 128, 128)
    assert found.occlusion.std() > 0 and found.log_variance.abs().max() < 8
    network.zero_grad()
    (found.occlusion.sum() + found.log_variance.square().sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in network.raft.parameters())
    assert all(p.grad.any() for p in network.heads.parameters())


def test_every_update_is_trained_and_the_gradient_reaches_all_of_the_flow(network):
    network.train()
    found = predict(network, images(1), images(1).flip(-1), updates=3)
    assert len(found.flows) == 3
    network.zero_grad()
    sum(flow.abs().mean() for flow in found.flows).backward()
    network.eval()
    assert not [n for n, p in network.raft.named_parameters() if p.grad is None]
    assert all(p.grad is None for p in network.heads.parameters())


def test_new_heads_start_undecided_at_one_pixel():
    found = predict(FlowNetwork("small", heads=True).eval(), images(1), images(1), 1)
    assert not found.occlusion.any() and not found.log_variance.any()


def test_weights_are_half_precision_and_come_back_with_or_without_heads(network, tmp_path):
    variant = "large" if network.raft.mask_predictor else "small"
    path = tmp_path / "weights.safetensors"
    save_file(network.weights(), path)
    state = read_weights(path)
    assert {v.dtype for v in state.values()} <= {torch.float16, torch.int64}
    again = FlowNetwork.of(state, variant).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value.half(), again[name].half()), name
    flow_alone = {n: v for n, v in state.items() if not n.startswith("heads.")}
    plain = getattr(optical_flow, f"raft_{variant}")(weights=None)
    plain.load_state_dict(flow_alone)
    assert FlowNetwork.of(plain.state_dict(), variant).heads is None


def test_the_small_network_fits_the_package():
    size = sum(v.numel() * v.element_size() for v in FlowNetwork("small", True).weights().values())
    assert size < 3e6
