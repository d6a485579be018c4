import numpy as np
import torch
from scipy.fft import dctn, idctn

from omni.synthetic.camera_effects import LUMA, compress, expose, filmed_frames


def picture(count=1, size=(24, 40)):
    torch.manual_seed(0)
    rows = torch.linspace(0, 6, size[0])[:, None] + torch.linspace(0, 9, size[1])
    return (0.5 + 0.3 * torch.sin(rows) + 0.1 * torch.rand(count, 3, *size)).clamp(0, 1)


def test_compression_quantises_the_cosine_transform_of_each_block():
    image, step = picture(), 0.07
    found = compress(image, torch.full((1, 1, 1, 1), step))[0, :, 8:16, 16:24].numpy()
    luma = np.array(LUMA)
    block = np.einsum("ij,jhw->ihw", luma, image[0, :, 8:16, 16:24].numpy())
    index = np.arange(8)
    grid = step * (1 + index + index[:, None]) * np.array([1, 2, 2])[:, None, None]
    coefficients = dctn(block, axes=(1, 2), norm="ortho")
    block = idctn(np.rint(coefficients / grid) * grid, axes=(1, 2), norm="ortho")
    expected = np.einsum("ij,jhw->ihw", np.linalg.inv(luma), block)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_compression_leaves_an_image_alone_and_more_costs_more():
    image = picture(3, (21, 30))  # no multiple of the block size
    steps = torch.tensor([0.0, 0.02, 0.2]).reshape(3, 1, 1, 1)
    error = (compress(image, steps) - image).abs().mean((1, 2, 3))
    assert error[0] == 0 and 0 < error[1] < 0.5 * error[2] and error[2] < 0.1


def test_photographs_of_a_pair_differ_mildly_and_a_seed_decides_them():
    image = picture(40)
    pair = expose([image, image], torch.Generator().manual_seed(4))
    again = expose([image, image], torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(pair, again, strict=True))
    assert pair[0].dtype == torch.uint8 and pair[0].shape == image.shape
    change = (pair[0].float() - pair[1].float()).abs().mean((1, 2, 3)) / 255
    assert (change == 0).any(), "some scenes are photographed ideally"
    assert 0.01 < change.max() < 0.3
    assert (pair[0].float() / 255 - image).abs().mean() > 0.02


def test_a_filmed_video_is_its_frames_exposed():
    video = (255 * picture(3)).byte().movedim(1, -1).numpy()
    filmed = filmed_frames(video, 4)
    assert filmed.dtype == np.uint8 and filmed.shape == video.shape
    images = [torch.from_numpy(frame).movedim(-1, 0)[None] / 255 for frame in video]
    expected = expose(images, torch.Generator().manual_seed(4))
    for frame, image in zip(filmed, expected, strict=True):
        np.testing.assert_array_equal(frame, image[0].movedim(0, -1).numpy())
