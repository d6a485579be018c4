import numpy as np
import torch

from omni.synthetic import Texture
from preprocess.training import textures
from preprocess.training.textures import TextureBank, leaves


def test_lookup_is_seamless_bilinear_and_picks_the_level_of_the_footprint():
    bank = TextureBank(2, seed=0)
    index = torch.tensor([1])
    at = [torch.tensor([[x, 0.3]]) for x in (0.1, 1.1, -0.9)]
    fine = [bank.sample(index, uv, torch.tensor([1 / 512])) for uv in at]
    torch.testing.assert_close(fine[0], fine[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(fine[0], fine[2], atol=1e-3, rtol=0)
    left, middle, right = (
        bank.sample(index, torch.tensor([[x / 512, 4.5 / 512]]), torch.tensor([1 / 512]))
        for x in (7.5, 7.75, 8.5)
    )
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right, atol=1e-4, rtol=0)
    wide = 8 / 512
    axis = (torch.arange(8) + 0.5) / 512
    square = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 2)
    fine = bank.sample(torch.ones(1, 64, dtype=torch.int64), square, torch.full((1, 64), 1 / 512))
    far = bank.sample(index, torch.tensor([[wide / 2, wide / 2]]), torch.tensor([wide]))
    torch.testing.assert_close(far[0], fine.mean((0, 1)), atol=0.01, rtol=0)


def test_a_bank_is_decided_by_its_seed_and_has_different_textures():
    uv, width = torch.rand(1, 300, 2), torch.full((1, 300), 1 / 512)

    def look(bank, index):
        return bank.sample(torch.full((1, 300), index), uv, width)

    first, again, other = TextureBank(3, 7), TextureBank(3, 7), TextureBank(3, 8)
    assert torch.equal(look(first, 2), look(again, 2))
    assert (look(first, 2) - look(other, 2)).abs().mean() > 0.02
    assert (look(first, 0) - look(first, 1)).abs().mean() > 0.02


def test_leaves_have_the_edges_of_occluding_things():
    """Most neighbouring pixels match, some differ sharply: heavier tails than a Gaussian's."""
    image = leaves(np.random.default_rng(0), 400).levels[1].mean(-1)
    slope = np.diff(image, axis=1)
    kurtosis = ((slope - slope.mean()) ** 4).mean() / slope.var() ** 2
    assert kurtosis > 6


def test_outlines_of_leaves_are_smooth(monkeypatch):
    """White leaves on a plain ground without grain: only their borders have other tones."""
    white = Texture.of(np.ones((512, 512, 3)))
    monkeypatch.setattr(textures, "noise", lambda *_: white)
    image = leaves(np.random.default_rng(0), 40).levels[0][..., 0]
    values, counts = np.unique(image, return_counts=True)
    assert len(values) > 20 and np.sort(counts)[-2:].sum() > 0.9 * image.size
