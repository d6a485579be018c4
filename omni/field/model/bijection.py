"""Bijections between each frame's local volume and the canonical volume.

local -> stabilised (per-frame affine motion of x, y) -> canonical (Real-NVP couplings).

Points are `(K, N, 3)`: K groups that share one time, N points each, last axis x, y, z, all roughly
in `[-1, 1]` (x, y normalised, z = depth - 1). Letters: C couplings, H hidden width, T frames.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from omni.field.model.networks import GaborNetwork, encoded_width, positional_encoding
from omni.maths import bspline_weights, catmull_rom_weights, num_control_points, table_at

__all__ = ["Coupling", "GaborCode", "GlobalMotion", "PlaneMotion", "RealNVP", "SplineCode"]

AXES = (2, 1, 0)
"""Axis changed by successive couplings: z, y, x, z, y, x, ..."""


class SplineCode(nn.Module):
    """Frame code as a cubic B-spline in time: C2, so the bijection is defined at any real time."""

    def __init__(self, num_frames: int, dim: int, spacing: float):
        super().__init__()
        self.spacing = spacing
        count = num_control_points(num_frames, spacing)
        self.points = nn.Parameter(0.1 * torch.randn(count, dim))

    def forward(self, times: Tensor) -> Tensor:
        """Codes `(K, dim)` at `(K,)` times in frames."""
        return table_at(self.points, *bspline_weights(times, self.spacing, len(self.points)))


class GaborCode(nn.Module):
    """Frame code of the original: a Gabor network of `(t + 1) / T`.

    Source: OmniMotion, section 4.2 and released code (width 256, 3 filters).
    """

    def __init__(self, num_frames: int, dim: int):
        super().__init__()
        self.num_frames = num_frames
        self.network = GaborNetwork(1, 256, dim, filters=3, alpha=4.5)

    def forward(self, times: Tensor) -> Tensor:
        """Codes `(K, dim)` at `(K,)` times in frames."""
        return self.network((times[:, None] + 1) / self.num_frames)


class Coupling(nn.Module):
    """Affine coupling of one axis given the other two and the frame code.

    forward (local to canonical): `v' = (v - t) exp(-s)`; inverse: `v = v' exp(s) + t`.
    `s` is bounded by `bound * tanh(raw / bound)`, which has a gradient everywhere, unlike the
    original's hard clamp.

    Source: Dinh et al., Real NVP, eq. 7-8; OmniMotion supplement, one axis per layer.
    """

    def __init__(
        self,
        axis: int,
        octaves: int,
        code_dim: int,
        hidden: int,
        layers: int,
        pre_layers: int,
        bound: float,
        identity_start: bool,
    ):
        super().__init__()
        self.axis, self.bound = axis, bound
        self.kept = [a for a in range(3) if a != axis]
        width = 2 * encoded_width(octaves)
        self.pre = nn.ModuleList()
        for _ in range(pre_layers):
            self.pre.append(nn.Linear(width, hidden))
            width = hidden
        self.entry = nn.Linear(width + code_dim, hidden)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.output = nn.Linear(hidden, 2)
        if identity_start:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def embed(self, code: Tensor) -> Tensor:
        """The frame code's share `(K, 1, H)` of the entry layer: once per frame, not per point."""
        split = self.entry.in_features - code.shape[-1]
        return (code @ self.entry.weight[:, split:].T + self.entry.bias)[:, None]

    def scale_shift(
        self, encoded: Mapping[int, Tensor], embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`s` and `t`, each `(K, N)`, from the encodings of the axes kept and `embed`'s result."""
        h = torch.cat([encoded[a] for a in self.kept], dim=-1)
        for layer in self.pre:
            h = leaky_relu(layer(h))
        h = leaky_relu(h @ self.entry.weight[:, : h.shape[-1]].T + embedding)
        for layer in self.layers:
            h = leaky_relu(layer(h))
        raw, shift = self.output(h).unbind(-1)
        return self.bound * torch.tanh(raw / self.bound), shift


class RealNVP(nn.Module):
    """Stack of couplings conditioned on a frame code; exactly invertible in closed form.

    Points may be more precise than the networks: double-precision points through single-precision
    networks are recovered to 1e-9, since both directions condition on bitwise the same values.

    Args:
        code: module mapping `(K,)` times to `(K, code_dim)`.
        code_dim: its width.
        couplings: C.
        octaves: of the positional encoding.
        project_code: one small network per coupling maps the code first (original).
        **coupling: further arguments of `Coupling`.
    """

    def __init__(
        self,
        code: nn.Module,
        code_dim: int,
        couplings: int,
        octaves: int,
        project_code: bool,
        **coupling: Any,
    ):
        super().__init__()
        self.code, self.octaves = code, octaves
        self.couplings = nn.ModuleList(
            Coupling(AXES[i % 3], octaves, code_dim, **coupling) for i in range(couplings)
        )
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(code_dim, code_dim), nn.LeakyReLU(), nn.Linear(code_dim, code_dim)
            )
            for _ in range(couplings * project_code)
        )

    def embed(self, times: Tensor) -> list[Tensor]:
        """Everything that depends on time alone: one `(K, 1, H)` tensor per coupling."""
        code = self.code(times)
        codes = [p(code) for p in self.projectors] or [code] * len(self.couplings)
        couplings = cast("Iterable[Coupling]", self.couplings)
        return [layer.embed(c) for layer, c in zip(couplings, codes, strict=True)]

    def forward(self, points: Tensor, embedding: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Local to canonical.

        Args:
            points: `(K, N, 3)`.
            embedding: `embed` of the K times.

        Returns:
            `(K, N, 3)` canonical points and `(K, N)` log |det Jacobian|.
        """
        return self._sweep(points, list(zip(self.couplings, embedding, strict=True)), False)

    def inverse(self, points: Tensor, embedding: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Canonical to local: the exact inverse of `forward`, same arguments and returns."""
        pairs = list(zip(self.couplings, embedding, strict=True))[::-1]
        return self._sweep(points, pairs, True)

    def _sweep(self, points: Tensor, pairs: list, inverse: bool) -> tuple[Tensor, Tensor]:
        values = list(points.unbind(-1))
        # Each axis is encoded when a coupling first reads it: what none reads costs nothing.
        encoded: dict[int, Tensor] = {}
        log_det = torch.zeros_like(values[0])
        for layer, embedding in pairs:
            for kept in layer.kept:
                if kept not in encoded:
                    # In the networks' precision, whatever the points'.
                    value = values[kept].to(embedding.dtype)
                    encoded[kept] = positional_encoding(value, self.octaves)
            scale, shift = (v.to(points.dtype) for v in layer.scale_shift(encoded, embedding))
            axis = layer.axis
            if inverse:
                values[axis] = values[axis] * scale.exp() + shift
                log_det = log_det + scale
            else:
                values[axis] = (values[axis] - shift) * (-scale).exp()
                log_det = log_det - scale
            encoded.pop(axis, None)
        return torch.stack(values, dim=-1), log_det


class GlobalMotion(nn.Module):
    """Per-frame affine map of x, y from the frame to a common stabilised plane; z is untouched.

    It models the camera's motion, so that the couplings fit only the remaining motion. Between
    frames the six numbers are interpolated by a cubic through the frames' values.
    """

    def __init__(self, num_frames: int):
        super().__init__()
        identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        self.matrices = nn.Parameter(identity.repeat(num_frames, 1, 1))

    def at(self, times: Tensor) -> Tensor:
        """Matrices `(K, 2, 3)` at `(K,)` times, frames."""
        return table_at(self.matrices, *catmull_rom_weights(times, len(self.matrices)))

    @staticmethod
    def stabilize(points: Tensor, matrix: Tensor) -> Tensor:
        """Local `(K, N, 3)` to stabilised."""
        matrix = matrix.to(points.dtype)
        xy = points[..., :2] @ matrix[..., :2].mT + matrix[..., None, :, 2]
        return torch.cat([xy, points[..., 2:]], dim=-1)

    @staticmethod
    def restore(points: Tensor, matrix: Tensor) -> Tensor:
        """Stabilised `(K, N, 3)` to local: the exact inverse of `stabilize`."""
        matrix = matrix.to(points.dtype)
        a, b, c, d = matrix[..., :2].flatten(-2).unbind(-1)
        adjugate = torch.stack([d, -b, -c, a], dim=-1).unflatten(-1, (2, 2))
        inverse = adjugate / (a * d - b * c)[..., None, None]
        xy = (points[..., :2] - matrix[..., None, :, 2]) @ inverse.mT
        return torch.cat([xy, points[..., 2:]], dim=-1)


class PlaneMotion(nn.Module):
    """Affine map of x, y per frame and depth: every plane of evenly spaced depths has its own.

    Between planes the parameters are interpolated, so that the map is a coupling: of x and y
    together, given z and the time. `xy' = R(angle) [[e^a, k], [0, e^b]] xy + t` reaches every
    orientation-preserving affine map and is invertible for all values of its parameters.

    Source: layered motion, Wang and Adelson 1994; the coupling of Dinh et al., Real NVP.
    """

    def __init__(self, num_frames: int, planes: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_frames, planes, 6))

    def start_from(self, maps: Tensor) -> None:
        """Take over affine maps `(P, T, 2, 3)` of the planes, the nearest one first."""
        (a, b, shift_x), (c, d, shift_y) = (row.unbind(-1) for row in maps.double().unbind(-2))
        angle, stretch = torch.atan2(c, a), torch.hypot(a, c)
        # Without jumps by whole turns, between which times could not be interpolated.
        turn = 2 * torch.pi * torch.round(angle.diff(dim=1) / (2 * torch.pi)).cumsum(1)
        angle = torch.cat([angle[:, :1], angle[:, 1:] - turn], dim=1)
        across = ((a * d - b * c) / stretch).clamp(min=1e-3)
        shear = (a * b + c * d) / stretch
        values = [angle, stretch.log(), across.log(), shear, shift_x, shift_y]
        with torch.no_grad():
            self.values.copy_(torch.stack(values, dim=-1).transpose(0, 1))

    def at(self, times: Tensor) -> Tensor:
        """Parameters `(K, P, 6)` of the planes at `(K,)` times, frames."""
        return table_at(self.values, *catmull_rom_weights(times, len(self.values)))

    @staticmethod
    def stabilize(points: Tensor, values: Tensor) -> Tensor:
        """Stabilised `(K, N, 3)` to a plane in which every layer is at rest."""
        (a, b, c, d), shift = _plane_maps(points, values)
        x, y = points[..., :2].unbind(-1)
        xy = torch.stack([a * x + b * y, c * x + d * y], dim=-1) + shift
        return torch.cat([xy, points[..., 2:]], dim=-1)

    @staticmethod
    def restore(points: Tensor, values: Tensor) -> Tensor:
        """The exact inverse of `stabilize`."""
        (a, b, c, d), shift = _plane_maps(points, values)
        x, y = (points[..., :2] - shift).unbind(-1)
        xy = torch.stack([d * x - b * y, a * y - c * x], dim=-1) / (a * d - b * c)[..., None]
        return torch.cat([xy, points[..., 2:]], dim=-1)


def _plane_maps(points: Tensor, values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Matrices, four of `(K, N)`, and shifts `(K, N, 2)` at the depths of points `(K, N, 3)`."""
    planes = values.shape[1]
    # In the parameters' precision, whatever the points': both directions read the same depth.
    place = ((points[..., 2].to(values.dtype) + 1) * (planes / 2) - 0.5).clamp(0, planes - 1)
    share = (1 - (place[..., None] - torch.arange(planes, device=place.device)).abs()).clamp(min=0)
    angle, a, b, k, *shift = (share @ values).to(points.dtype).unbind(-1)
    cos, sin, a, b = angle.cos(), angle.sin(), a.exp(), b.exp()
    matrix = cos * a, cos * k - sin * b, sin * a, sin * k + cos * b
    return matrix, torch.stack(shift, dim=-1)
