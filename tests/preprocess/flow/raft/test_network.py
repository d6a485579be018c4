import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import optical_flow

from preprocess.flow.raft.network import FlowNetwork
from preprocess.flow.weights import read_weights

PIXELS = [(8, 8), (20, 100), (64, 64), (90, 31), (120, 120)]
"""Rows and columns of the stored flow."""
STORED = {
    "small": [
        [8.0903, -28.088],
        [5.717, -19.37],
        [19.1494, -20.7139],
        [19.8467, 5.5857],
        [-10.6526, -13.8462],
    ],
    "large": [
        [21.1869, -11.3126],
        [30.1659, 7.9371],
        [33.1303, 7.2256],
        [22.4748, -0.7153],
        [8.1686, 4.0975],
    ],
}
"""Flow in pixels at `PIXELS` after four updates of `deterministic` networks, on a CPU with torch
2.15; without oneDNN it differs by at most 0.00015 anywhere."""


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
    plain = getattr(optical_flow, f"raft_{request.param}")(weights=None)
    return FlowNetwork(plain.state_dict(), request.param).eval()


def test_the_flow_is_torchvisions(network):
    first, second = images(), images().flip(-1)
    with torch.no_grad():
        expected = network.raft(first, second, num_flow_updates=2)[-1]
        found = predict(network, first, second)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def deterministic(variant):
    """A network whose parameters depend on no library but numpy's frozen `RandomState`."""
    draw, state = np.random.RandomState(5), {}
    empty = getattr(optical_flow, f"raft_{variant}")(weights=None).state_dict()
    for name, value in sorted(empty.items()):
        if name.endswith(("running_var", "num_batches_tracked")):
            state[name] = torch.ones_like(value)
            continue
        fan_in = max(1, value[0].numel()) if value.dim() > 1 else 100
        numbers = draw.standard_normal(tuple(value.shape)) * np.sqrt(1.5 / fan_in)
        if name.endswith("weight") and value.dim() == 1:
            numbers += 1  # scale of a normalisation
        state[name] = torch.from_numpy(numbers.astype(np.float32))
    return FlowNetwork(state, variant).eval()


@pytest.mark.parametrize("variant", list(STORED))
def test_the_flow_of_a_fixed_network_is_as_stored(variant):
    row, column = np.mgrid[:128, :128]
    waves = [
        np.sin(0.21 * (column - 3 * time) + 0.13 * channel * (row + 2 * time))
        for time in (0, 1)
        for channel in (1, 2, -3)
    ]
    first, second = torch.tensor(np.array(waves), dtype=torch.float32).reshape(2, 1, 3, 128, 128)
    with torch.no_grad():
        flow = predict(deterministic(variant), first, second, updates=4)[0].movedim(0, -1)
    found = flow.numpy()[tuple(np.transpose(PIXELS))]
    np.testing.assert_allclose(found, STORED[variant], atol=1e-3)


def test_mixed_precision_keeps_correlation_exact(network):
    first, second = images(1), images(1).flip(-1)
    with torch.no_grad():
        exact = predict(network, first, second)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = predict(network, first, second)
    assert network.raft.corr_block.corr_pyramid[0].dtype == mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_weights_in_half_precision_are_read(network, tmp_path):
    variant, path = "large" if network.raft.mask_predictor else "small", tmp_path / "w.safetensors"
    state = network.raft.state_dict()
    save_file({n: v.half() if v.is_floating_point() else v for n, v in state.items()}, path)
    again = FlowNetwork(read_weights(path), variant).raft.state_dict()
    for name, value in state.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(value.half(), again[name].half()), name
