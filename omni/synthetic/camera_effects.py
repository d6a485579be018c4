"""Degradation of an ideal image by camera and codec: exposure, colour, defocus, noise, compression.

Images are (B, 3, H, W) float in [0, 1]. Effects are drawn per scene, and again, more mildly, per
image, so that the two images of a pair differ as neighbouring video frames do.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["compress", "expose", "filmed_frames"]

BLOCK = 8
"""pixels per side of a compression block"""
LUMA = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))
"""rows: luma and two chroma channels from red, green and blue"""


def filmed_frames(video: np.ndarray, seed: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 RGB of `video`, of the same shape, with the effects of `expose`."""
    images = torch.from_numpy(np.array(video)).permute(0, 3, 1, 2).float() / 255
    filmed = expose(list(images[:, None]), torch.Generator().manual_seed(seed))
    return torch.cat(filmed).permute(0, 2, 3, 1).contiguous().numpy()


def expose(frames: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Photographs (B, 3, H, W) uint8 of ideal images of the same B scenes.

    Args:
        frames: images at one or more times, each (B, 3, H, W).
        generator: on the images' device; the only source of randomness.
    """
    count, device = len(frames[0]), frames[0].device

    def draw(deviation: float, channels: int = 1) -> Tensor:
        return deviation * torch.randn(count, channels, 1, 1, generator=generator, device=device)

    def chance(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator, device=device) < share

    gamma, color = torch.exp(draw(0.2)), torch.exp(draw(0.1, 3))
    changing = chance(0.4)  # exposure or white balance drifts between frames
    soft = draw(0.8).abs() * chance(0.4)
    grain, steps = draw(0.02).abs() * chance(0.6), draw(0.03).abs() * chance(0.5)
    photographs = []
    for frame in frames:
        drift = torch.where(changing, torch.exp(draw(0.08) + draw(0.03, 3)), 1.0)
        image = (frame.clamp(0, 1) ** gamma * color * drift).clamp(0, 1)
        image = _defocus(image, soft * (1 + draw(0.1)).clamp(min=0))
        noise = torch.randn(image.shape, generator=generator, device=device)
        image = image + noise * grain * (0.3 + image.sqrt())
        image = compress(image, steps)
        photographs.append((image.clamp(0, 1) * 255).round().byte())
    return photographs


def compress(images: Tensor, step: Tensor) -> Tensor:
    """Images after quantising the cosine transform of every 8 x 8 block, as JPEG and MPEG do.

    Args:
        images: (B, 3, H, W), any size.
        step: (B, 1, 1, 1) quantisation step of the lowest frequency; 0 leaves an image as it is.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    luma = torch.tensor(LUMA, device=images.device)
    channels = torch.einsum("ij,bjhw->bihw", luma, padded)
    rows, columns = padded.shape[-2] // BLOCK, padded.shape[-1] // BLOCK
    blocks = channels.reshape(-1, 3, rows, BLOCK, columns, BLOCK).transpose(3, 4)
    index = torch.arange(BLOCK, device=images.device)
    cosine = torch.cos(math.pi * (index + 0.5) * index[:, None] / BLOCK) * math.sqrt(2 / BLOCK)
    cosine[0] /= math.sqrt(2)
    coefficients = cosine @ blocks @ cosine.T
    rising = 1 + index + index[:, None]
    chroma = torch.tensor([1.0, 2.0, 2.0], device=images.device).reshape(3, 1, 1, 1, 1)
    grid = step.reshape(-1, 1, 1, 1, 1, 1).clamp(min=1e-6) * rising * chroma
    blocks = cosine.T @ ((coefficients / grid).round() * grid) @ cosine
    channels = blocks.transpose(3, 4).reshape(channels.shape)
    restored = torch.einsum("ij,bjhw->bihw", luma.inverse(), channels)[..., :height, :width]
    return torch.where(step > 0, restored, images)


def _defocus(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of `sigma` (B, 1, 1, 1) pixels, up to 2; none below a fifth of a pixel."""
    offset = torch.arange(-4, 5, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma.reshape(-1, 1).clamp(0.2, 2)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = images.reshape(1, -1, *images.shape[-2:])
    flat = F.pad(flat, (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None], groups=len(kernel))
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return flat.reshape(images.shape)
