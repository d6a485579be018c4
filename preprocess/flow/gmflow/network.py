"""GMFlow: optical flow as global matching of features that a transformer makes distinctive.

Features of both images at an eighth of their size are matched globally, the flow is propagated to
what has no match, and refined at a quarter by matching within a window. Parameters have the names
of the published checkpoints.

Letters: B pairs, C channels, H x W size of features, W windows along a side.

Source: Xu et al., GMFlow: Learning Optical Flow via Global Matching, CVPR 2022; two scales.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MULTIPLE", "GMFlow"]

MULTIPLE = 32
"""Sides of images are multiples of this: two windows along an eighth of them, eight along a
quarter."""

CHANNELS, LAYERS = 128, 6
WINDOWS_EIGHTH, WINDOWS_QUARTER = 2, 8
"""Windows along a side within which a layer attends, at either scale."""

MATCHING_RADIUS, PROPAGATION_RADIUS = 4, 1
"""Radii of the windows at a quarter, in its pixels."""

UPSAMPLING = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Features = tuple[Tensor, Tensor]
"""Of images, `(B, C, H, W)` each: at an eighth and at a quarter of their size."""


class ResidualBlock(nn.Module):
    """Two convolutions with instance normalisation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        shortcut = nn.Conv2d(inputs, outputs, 1, stride), nn.InstanceNorm2d(outputs)
        self.downsample = None if inputs == outputs and stride == 1 else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / stride, W / stride)`."""
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Encoder(nn.Module):
    """Convolutional features at two scales, the last layer of which has shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.layer1 = nn.Sequential(ResidualBlock(64, 64, 1), ResidualBlock(64, 64, 1))
        self.layer2 = nn.Sequential(ResidualBlock(64, 96, 2), ResidualBlock(96, 96, 1))
        self.layer3 = nn.Sequential(ResidualBlock(96, 128, 1), ResidualBlock(128, 128, 1))
        self.conv2 = nn.Conv2d(128, CHANNELS, 1)
        self.trident_conv = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False)

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images `(B, 3, H, W)`."""
        x = F.relu(F.instance_norm(self.conv1(images)))
        x = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        weight = self.trident_conv.weight
        return F.conv2d(x, weight, stride=2, padding=1), F.conv2d(x, weight, padding=1)


class Attention(nn.Module):
    """Attention of one image's features to another's, added to them; with a network if `deep`."""

    def __init__(self, deep: bool):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.merge = (
            nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(4)
        )
        self.norm1 = nn.LayerNorm(CHANNELS)
        self.deep = deep
        if deep:
            wide = 2 * CHANNELS
            self.mlp = nn.Sequential(
                nn.Linear(wide, 4 * wide, bias=False),
                nn.GELU(),
                nn.Linear(4 * wide, CHANNELS, bias=False),
            )
            self.norm2 = nn.LayerNorm(CHANNELS)

    def forward(self, source: Tensor, target: Tensor, windows: int, mask: Tensor | None) -> Tensor:
        """Of features `(B, H, W, C)`.

        Args:
            source: which attend.
            target: to which.
            windows: along a side, within which they attend.
            mask: of `_shifted_mask`, with windows moved by half their size; None without.
        """
        parts = self.q_proj(source), self.k_proj(target), self.v_proj(target)
        height, width = (side // windows for side in source.shape[1:3])
        if mask is not None:
            shift = height // 2, width // 2
            parts = tuple(part.roll((-shift[0], -shift[1]), (1, 2)) for part in parts)
        q, k, v = (_split(part, windows).flatten(1, 2) for part in parts)
        if mask is not None:
            mask = mask.repeat(len(source), 1, 1)
        message = F.scaled_dot_product_attention(q, k, v, mask)
        message = _merged(message.unflatten(1, (height, width)), windows)
        if mask is not None:
            message = message.roll(shift, (1, 2))
        message = self.norm1(self.merge(message))
        if self.deep:
            message = self.norm2(self.mlp(torch.cat([source, message], dim=-1)))
        return source + message


class TransformerBlock(nn.Module):
    """Attention within an image, then to the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn_ffn = Attention(deep=False), Attention(deep=True)

    def forward(self, source: Tensor, target: Tensor, windows: int, mask: Tensor | None) -> Tensor:
        """Of features `(B, H, W, C)`; arguments as `Attention`."""
        source = self.self_attn(source, source, windows, mask)
        return self.cross_attn_ffn(source, target, windows, mask)


class Transformer(nn.Module):
    """Makes the features of two images distinctive; every other block has shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock() for _ in range(LAYERS))

    def forward(self, first: Tensor, second: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        """Of features `(B, C, H, W)`, with their positions added."""
        size = first.shape[-2:]
        position = _positions((size[0] // windows, size[1] // windows), first)
        position = position.repeat(windows, windows, 1)
        both = torch.cat([first, second]).movedim(1, -1) + position
        mask = _shifted_mask(size, windows, both)
        for number, layer in enumerate(self.layers):
            others = torch.cat(both.chunk(2)[::-1])
            both = layer(both, others, windows, mask if number % 2 else None)
        first, second = both.movedim(-1, 1).chunk(2)
        return first, second


class Propagation(nn.Module):
    """Flow as the mean of that of similar pixels, which also reaches what has no match."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(CHANNELS, CHANNELS) for _ in range(2))

    def everywhere(self, features: Tensor, flow: Tensor) -> Tensor:
        """Over all pixels; features `(B, C, H, W)`, flow `(B, 2, H, W)`."""
        query = self.q_proj(features.flatten(2).mT)
        # The published weights project the query once more instead of the features.
        moved = F.scaled_dot_product_attention(query, self.k_proj(query), flow.flatten(2).mT)
        return moved.mT.unflatten(2, flow.shape[-2:])

    def nearby(self, features: Tensor, flow: Tensor) -> Tensor:
        """Over the window of PROPAGATION_RADIUS; arguments as `everywhere`."""
        flat = features.movedim(1, -1)
        query, key = self.q_proj(flat).movedim(-1, 1), self.k_proj(flat).movedim(-1, 1)
        scores = _window_products(query, key, PROPAGATION_RADIUS)
        weight = (scores / math.sqrt(CHANNELS)).softmax(1)
        around = F.unfold(flow, 2 * PROPAGATION_RADIUS + 1, padding=PROPAGATION_RADIUS)
        around = around.unflatten(1, (2, -1)).unflatten(-1, flow.shape[-2:])
        return (weight[:, None] * around).sum(2)


class GMFlow(nn.Module):
    """Flow between two images in both directions, from the features of either."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.transformer = Encoder(), Transformer()
        self.feature_flow_attn = Propagation()
        self.upsampler = nn.Sequential(
            nn.Conv2d(2 + CHANNELS, 256, 3, 1, 1), nn.ReLU(), nn.Conv2d(256, UPSAMPLING**2 * 9, 1)
        )

    def encode(self, images: Tensor) -> Features:
        """Features of images `(B, 3, H, W)` RGB in [0, 1], whose sides are multiples of MULTIPLE.

        At an eighth and a quarter of their size; those of each image do not depend on the others.
        """
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return self.backbone((images - mean) / std)

    def forward(self, first: Features, second: Features, refine: bool = True) -> Tensor:
        """Flow `(2 B, 2, H, W)` in pixels of the images, first to second and then back.

        Args:
            first: features of B images.
            second: of those that they are matched to.
            refine: at a quarter of the size; else the flow is interpolated from an eighth.
        """
        source, target = self.transformer(first[0], second[0], WINDOWS_EIGHTH)
        source, target = torch.cat([source, target]), torch.cat([target, source])
        flow = self.feature_flow_attn.everywhere(source, _matched_globally(source, target))
        if not refine:
            return _enlarged(flow, 8)
        flow = _enlarged(flow, 2)
        source, target = torch.cat([first[1], second[1]]), torch.cat([second[1], first[1]])
        source, target = self.transformer(source, _warped(target, flow), WINDOWS_QUARTER)
        flow = flow + _matched_nearby(source, target)
        flow = self.feature_flow_attn.nearby(source, flow)
        return self._upsampled(flow, source)

    def _upsampled(self, flow: Tensor, features: Tensor) -> Tensor:
        """Convex combinations of neighbours, as in RAFT, section 3.3."""
        weight = self.upsampler(torch.cat([flow, features], dim=1))
        weight = weight.unflatten(1, (9, UPSAMPLING, UPSAMPLING)).softmax(1)
        around = F.unfold(UPSAMPLING * flow, 3, padding=1)
        around = around.unflatten(1, (2, 9)).unflatten(-1, flow.shape[-2:])
        fine = torch.einsum("bkijhw,bckhw->bchiwj", weight, around)
        return fine.flatten(4, 5).flatten(2, 3)


def _split(features: Tensor, windows: int) -> Tensor:
    """`(B, H, W, C)` to windows `(B W W, H / W, W / W, C)`, row by row."""
    parts = features.unflatten(2, (windows, -1)).unflatten(1, (windows, -1))
    return parts.transpose(2, 3).flatten(0, 2)


def _merged(parts: Tensor, windows: int) -> Tensor:
    """The inverse of `_split`."""
    features = parts.unflatten(0, (-1, windows, windows)).transpose(2, 3)
    return features.flatten(3, 4).flatten(1, 2)


def _shifted_mask(size: torch.Size, windows: int, like: Tensor) -> Tensor:
    """Added to the scores of shifted windows `(W W, N, N)`: -100 between the frame's two ends.

    Source: Liu et al., Swin Transformer, ICCV 2021, figure 4.
    """
    ends = []
    for side in size:
        window = side // windows
        place = torch.arange(side, device=like.device)
        ends.append((place >= side - window).long() + (place >= side - window // 2).long())
    region = 3 * ends[0][:, None] + ends[1]
    region = _split(region[None, :, :, None], windows).flatten(1)
    return -100.0 * (region[:, None] != region[:, :, None]).to(like.dtype)


def _positions(size: tuple[int, int], like: Tensor) -> Tensor:
    """Sines and cosines `(H, W, C)` of the rows and columns, scaled to a turn.

    Source: Vaswani et al., section 3.5, in two dimensions as in DETR.
    """
    half = CHANNELS // 2
    frequency = 10000.0 ** (torch.arange(0, half, 2, device=like.device) / half)
    encoded = []
    for side in size:
        place = torch.arange(1.0, side + 1, device=like.device)
        angle = place / (side + 1e-6) * (2 * math.pi)
        angle = angle[:, None] / frequency
        encoded.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1))
    rows, columns = encoded
    shape = *size, half
    both = rows[:, None].expand(shape), columns.expand(shape)
    return torch.cat(both, dim=-1).to(like.dtype)


def _grid(like: Tensor) -> Tensor:
    """Columns and rows `(2, H, W)` of features `(..., H, W)`."""
    height, width = like.shape[-2:]
    rows, columns = (torch.arange(s, device=like.device, dtype=like.dtype) for s in (height, width))
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])


def _matched_globally(source: Tensor, target: Tensor) -> Tensor:
    """Mean displacement `(B, 2, H, W)` to all pixels, by the softmax of feature products."""
    grid = _grid(source)
    places = grid.flatten(1).mT.expand(len(source), -1, -1)
    query, key = source.flatten(2).mT, target.flatten(2).mT
    arrived = F.scaled_dot_product_attention(query, key, places)
    return arrived.mT.unflatten(2, grid.shape[1:]) - grid


def _matched_nearby(source: Tensor, target: Tensor) -> Tensor:
    """The same over the window of MATCHING_RADIUS, within the frame."""
    scores = _window_products(source, target, MATCHING_RADIUS) / math.sqrt(CHANNELS)
    ones = torch.ones_like(target[:1, :1])
    within = _window_products(ones, ones, MATCHING_RADIUS) > 0
    weight = scores.masked_fill(~within, -torch.inf).softmax(1)
    ticks = torch.arange(-MATCHING_RADIUS, MATCHING_RADIUS + 1, device=source.device)
    offsets = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy")).flatten(1)
    return torch.einsum("bkhw,ck->bchw", weight, offsets.to(weight.dtype))


def _window_products(source: Tensor, target: Tensor, radius: int) -> Tensor:
    """Products `(B, (2 r + 1)^2, H, W)` of features with those around them, row by row."""
    height, width = source.shape[-2:]
    padded, side = F.pad(target, [radius] * 4), range(2 * radius + 1)
    moved = (padded[..., y : y + height, x : x + width] for y in side for x in side)
    return torch.stack([(source * one).sum(1) for one in moved], dim=1)


def _warped(features: Tensor, flow: Tensor) -> Tensor:
    """Bilinear features `(B, C, H, W)` where a flow `(B, 2, H, W)` leads; 0 beyond the frame."""
    height, width = flow.shape[-2:]
    place = (_grid(flow) + flow).movedim(1, -1)
    place = 2 * place / place.new_tensor([width - 1, height - 1]) - 1
    return F.grid_sample(features, place, align_corners=True)


def _enlarged(flow: Tensor, factor: int) -> Tensor:
    return factor * F.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)
