import torch

from omni.maths import gaussian


def test_a_gaussian_is_exact_where_it_counts_and_never_subnormal():
    distance = torch.linspace(0, 200, 2001)
    weight = gaussian(distance.square(), 3.0)
    exact = torch.exp(-distance.double().square() / 18)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-20)
    assert weight.min() > torch.finfo(torch.float32).tiny
