"""RAFT: torchvision's network, split so that every frame is encoded once.

Letters: B pairs, h x w feature resolution (an eighth of the images), C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import optical_flow
from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

__all__ = ["SMALLEST_SIDE", "FlowNetwork"]

SMALLEST_SIDE = 128
"""pixels: four levels of correlation at 1/8 resolution"""


class FlowNetwork(nn.Module):
    """torchvision's `raft_small` or `raft_large`, for inference.

    Source: Teed and Deng, RAFT, ECCV 2020.

    Args:
        state: torchvision's parameters by name.
        variant: `large` or `small`, the architecture they are of.

    Raises:
        Exception: of any kind, when these are the parameters of something else.
    """

    def __init__(self, state: dict[str, Tensor], variant: str):
        super().__init__()
        self.raft = getattr(optical_flow, f"raft_{variant}")(weights=None)
        self.raft.load_state_dict(state)
        self._hidden = self.raft.update_block.hidden_state_size

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and context (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return self.raft.feature_encoder(images), self.raft.context_encoder(images)

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        context: Tensor,
        flow_init: Tensor | None = None,
        updates: int = 12,
    ) -> Tensor:
        """Flow (B, 2, H, W) of B pairs, in pixels.

        Args:
            features1: (B, C, h, w) of the first images.
            features2: (B, C, h, w) of the second images.
            context: (B, C, h, w) of the first images.
            flow_init: (B, 2, h, w) initial flow in pixels of the feature resolution, None for
                zero.
            updates: number of recurrent updates, at least 1.
        """
        raft, update = self.raft, self.raft.update_block
        raft.corr_block.corr_pyramid = []  # else the last call's stays in memory beside the new one
        with torch.autocast(context.device.type, enabled=False):  # sub-pixel peaks need all bits
            raft.corr_block.build_pyramid(features1.float(), features2.float())
        context = context.float()
        hidden, context = torch.tanh(context[:, : self._hidden]), F.relu(context[:, self._hidden :])
        flow = torch.zeros_like(context[:, :2]) if flow_init is None else flow_init
        origin = make_coords_grid(len(context), *context.shape[-2:]).to(context.device)
        for _ in range(updates):
            correlation = raft.corr_block.index_pyramid(origin + flow)
            motion = update.motion_encoder(flow, correlation)
            hidden = update.recurrent_block(hidden, torch.cat([context, motion], dim=1))
            flow = flow + update.flow_head(hidden).float()
        mask = None if raft.mask_predictor is None else raft.mask_predictor(hidden).float()
        return upsample_flow(flow, mask)
