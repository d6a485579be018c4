"""Image pairs with exact flow and occlusion, generated where the network is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from preprocess.training.random_scenes import draw_scenes
from preprocess.training.sensor import expose
from preprocess.training.textures import TextureBank

__all__ = ["FlowPairs", "PairSource"]

GAPS = (1, 1, 2, 4, 8, 16)
"""Frames between the two images of a training pair; scenes of a batch take them in turn."""


@dataclass(frozen=True)
class FlowPairs:
    """B pairs of images.

    first, second: (B, 3, H, W) uint8 RGB.
    flow: (B, 2, H, W) float32 pixels, first to second, also where the target is occluded.
    visible: (B, H, W) bool, the target is in the frame and not occluded.
    valid: (B, H, W) bool, the flow is defined.
    """

    first: Tensor
    second: Tensor
    flow: Tensor
    visible: Tensor
    valid: Tensor


class PairSource:
    """Generated pairs: batch `index` of a `seed` is always the same, so that training resumes.

    Args:
        size: (H, W) of the images.
        textures: how many textures the bank has.
        seed: of everything.
        device: where images are rendered and stay.
        surfaces: most surfaces of a scene.
        samples: rays per pixel.
    """

    def __init__(
        self,
        size: tuple[int, int],
        textures: int = 200,
        seed: int = 0,
        device: torch.device | str = "cpu",
        surfaces: int = 9,
        samples: int = 6,
    ):
        self.size, self.seed, self.device = size, seed, torch.device(device)
        self.surfaces, self.samples = surfaces, samples
        self.bank = TextureBank(textures, seed, device)

    @torch.no_grad()
    def batch(self, index: int, count: int, gap: int | None = None) -> FlowPairs:
        """`count` pairs, of half as many scenes: both directions of each, forward ones first.

        Args:
            index: which batch.
            count: B.
            gap: frames between the images; None takes those of `GAPS`.
        """
        scenes = range((count + 1) // 2)
        gaps = [float(gap or GAPS[(index + k) % len(GAPS)]) for k in scenes]
        seeds = [(self.seed, index, k) for k in scenes]
        drawn = draw_scenes(seeds, self.size, self.bank, gaps, self.surfaces, self.device)
        start = torch.zeros(len(gaps)).to(self.device)
        end = torch.tensor(gaps).to(self.device)
        generator = torch.Generator(self.device).manual_seed(_mix(self.seed, index))
        images = expose(
            [drawn.render(time, self.bank, self.samples) for time in (start, end)], generator
        )
        both = zip(drawn.flow(start, end), drawn.flow(end, start), strict=True)
        flow, visible, valid = (torch.cat(pair)[:count] for pair in both)
        first, second = (torch.cat(pair)[:count] for pair in (images, images[::-1]))
        return FlowPairs(first, second, flow.movedim(-1, 1), visible, valid)


def _mix(seed: int, index: int) -> int:
    """One 63-bit number of two; neighbours differ in about half of its bits."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
    mixed = (mixed ^ (mixed >> 30)) * 0x94D049BB133111EB & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
