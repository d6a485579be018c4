"""RAFT with heads: torchvision's network, plus occlusion and log-variance of its recurrent state.

The flow part is torchvision's, unchanged and under torchvision's names; the heads' parameters
start with `heads.`. So `raft_small().load_state_dict(state, strict=False)` reads our files, and we
read torchvision's.

Letters: B pairs, h x w feature resolution (an eighth of the images), C channels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import optical_flow
from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

__all__ = ["FlowNetwork", "Prediction", "read_weights"]

SMALLEST_SIDE = 128
"""pixels: four levels of correlation at 1/8 resolution"""

_HEAD_WIDTH = 64
_LARGEST = 8.0  # bound of the predicted log-variance: sigma between 0.02 and 55 pixels


@dataclass(frozen=True)
class Prediction:
    """Output of the network for B pairs of H x W images.

    flows: (B, 2, H, W) pixels after each update, or the last alone.
    occlusion: (B, H, W) logit of the point being hidden in the second image, None without heads.
    log_variance: (B, H, W) log of the variance per axis, pixels squared, None without heads.
    """

    flows: list[Tensor]
    occlusion: Tensor | None = None
    log_variance: Tensor | None = None


class FlowNetwork(nn.Module):
    """`raft_small` or `raft_large`, split so that every frame is encoded once; heads or none.

    Source: Teed and Deng, RAFT, ECCV 2020. Heads as in MFT (Neoral et al., WACV 2024): their
    inputs are recurrent state, context, correlation, flow, its last change and motion features,
    detached, so that flow is trained as if the heads were not there.

    Args:
        variant: `large` or `small`.
        heads: whether to have the heads.
    """

    def __init__(self, variant: str, heads: bool):
        super().__init__()
        self.raft = getattr(optical_flow, f"raft_{variant}")(weights=None)
        hidden = self.raft.update_block.hidden_state_size
        block = self.raft.update_block.recurrent_block.convgru1.convz
        channels = block.in_channels + self.raft.corr_block.out_channels + 4
        self.heads = _heads(channels) if heads else None
        self._hidden = hidden

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
    ) -> Prediction:
        """Flow of B pairs.

        Args:
            features1: (B, C, h, w) of the first images.
            features2: (B, C, h, w) of the second images.
            context: (B, C, h, w) of the first images.
            flow_init: (B, 2, h, w) initial flow in pixels of the feature resolution, None for
                zero.
            updates: number of recurrent updates; only while training all flows are returned.
        """
        raft, update = self.raft, self.raft.update_block
        raft.corr_block.corr_pyramid = []  # else the last call's stays in memory beside the new one
        with torch.autocast(context.device.type, enabled=False):  # sub-pixel peaks need all bits
            raft.corr_block.build_pyramid(features1.float(), features2.float())
        context = context.float()
        hidden, context = torch.tanh(context[:, : self._hidden]), F.relu(context[:, self._hidden :])
        flow = torch.zeros_like(context[:, :2]) if flow_init is None else flow_init
        origin = make_coords_grid(len(context), *context.shape[-2:]).to(context.device)
        flows = []
        for index in range(updates):
            flow = flow.detach()  # as RAFT: no gradient through where correlation is looked up
            correlation = raft.corr_block.index_pyramid(origin + flow)
            motion = update.motion_encoder(flow, correlation)
            hidden = update.recurrent_block(hidden, torch.cat([context, motion], dim=1))
            change = update.flow_head(hidden).float()
            flow = flow + change
            last = index == updates - 1
            if self.training or last:
                mask = None if raft.mask_predictor is None else raft.mask_predictor(hidden).float()
                flows.append(upsample_flow(flow, mask))
        if self.heads is None:
            return Prediction(flows)
        inputs = [hidden, context, motion, correlation, flow, change]
        raw = self.heads(torch.cat([part.float().detach() for part in inputs], dim=1)).float()
        mask = None if mask is None else mask.detach()
        # Upsampling multiplies by 8.
        occlusion, log_variance = upsample_flow(raw / 8, mask).unbind(1)
        bounded = _LARGEST * torch.tanh(log_variance / _LARGEST)
        return Prediction(flows, occlusion, bounded)

    def weights(self) -> dict[str, Tensor]:
        """Parameters under torchvision's names, the heads' under `heads.`, in half precision."""
        heads = {} if self.heads is None else self.heads.state_dict(prefix="heads.")
        state = self.raft.state_dict() | heads
        return {
            name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
            for name, value in state.items()
        }

    @classmethod
    def of(cls, state: dict[str, Tensor], variant: str) -> "FlowNetwork":
        """The network whose parameters `state` holds: torchvision's own or `weights`'.

        Args:
            state: parameters by name; heads only where there are any.
            variant: `large` or `small`, the architecture they are of.

        Returns:
            The network on the CPU, in single precision.

        Raises:
            Exception: of any kind, when these are the parameters of something else.
        """
        heads = {name for name in state if name.startswith("heads.")}
        network = cls(variant, bool(heads))
        network.raft.load_state_dict({n: v for n, v in state.items() if n not in heads})
        if heads:
            own = {name.removeprefix("heads."): state[name] for name in heads}
            assert network.heads is not None
            network.heads.load_state_dict(own)
        return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """Parameters by name, of a .safetensors file or a .pth file, without executing anything.

    Raises:
        Exception: of any kind, when the file is damaged.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _heads(channels: int) -> nn.Module:
    """Two channels, occlusion logit and log-variance; initially probability 1/2, sigma 1 pixel."""
    last = nn.Conv2d(_HEAD_WIDTH, 2, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    first = nn.Conv2d(channels, _HEAD_WIDTH, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(inplace=True), last)
