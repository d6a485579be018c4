"""Analytic surfaces in 3D and the camera that sees them: exact geometry of synthetic scenes.

Every surface maps between *material* coordinates (which point of the object) and space, both ways,
at any real-valued time, so that rays, tracks and flow are exact by construction. Axes: x right,
y down, z away from the camera; lengths in scene units, time in frames. Letters: N rays or points.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

from omni.synthetic.textures import Texture

__all__ = ["Box", "Camera", "Ellipsoid", "Joint", "Path", "Ripple", "Sheet", "Surface", "dot"]

NEAR = 0.05


@dataclass(frozen=True)
class Path:
    """A smooth vector function of time: `start + rate t + sum_k amplitude_k sin(...)`.

    waves: (amplitude (3,), period in frames, phase in radians) each.
    """

    start: tuple = (0.0, 0.0, 0.0)
    rate: tuple = (0.0, 0.0, 0.0)
    waves: tuple = ()

    def __call__(self, t: float) -> np.ndarray:
        """Value at time t, frames."""
        value = np.add(self.start, np.multiply(self.rate, t))
        for amplitude, period, phase in self.waves:
            value = value + np.multiply(amplitude, np.sin(2 * np.pi * t / period + phase))
        return value


@dataclass(frozen=True)
class Joint:
    """The end of an arm, as a function of time: what hangs on a turning body.

    base: where the arm begins. turn: rotation vector of the body that it belongs to. arm: (3,) in
    the frame of that body.
    """

    base: "Path | Joint"
    turn: Path
    arm: tuple

    def __call__(self, t: float) -> np.ndarray:
        """Place at time t, frames."""
        return self.base(t) + _rotation(self.turn, t) @ np.array(self.arm)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera; `focal` is in image widths and grows by the factor `zoom` per frame."""

    size: tuple[int, int]
    place: Path = Path()
    turn: Path = Path()
    focal: float = 1.0
    zoom: float = 1.0

    def scale(self, t: float) -> float:
        """Focal length in pixels."""
        return self.focal * self.zoom**t * self.size[1]

    def rays(self, xy: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Origin (3,) and directions (N, 3) through raster pixels (N, 2), of camera depth 1."""
        height, width = self.size
        right, down, ahead = _rotation(self.turn, t).T
        x = (xy[:, :1] - width / 2) / self.scale(t)
        y = (xy[:, 1:] - height / 2) / self.scale(t)
        return self.place(t), x * right + y * down + ahead

    def project(self, points: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Raster pixels (N, 2) and camera depth (N,) of points (N, 3); NaN behind the camera."""
        height, width = self.size
        local = (points - self.place(t)) @ _rotation(self.turn, t)
        depth = np.where(local[:, 2] > NEAR, local[:, 2], np.nan)
        return local[:, :2] / depth[:, None] * self.scale(t) + (width / 2, height / 2), depth


@dataclass(frozen=True)
class Surface(ABC):
    """What all surfaces share: a rigid pose over time, a texture and its repeats per unit.

    place, turn: position and rotation vector of the body frame over time.
    """

    texture: Texture
    place: Path | Joint = Path()
    turn: Path = Path()
    repeats: float = 1.0

    @property
    @abstractmethod
    def radius(self) -> float:
        """Of a sphere about the body origin that holds the surface; infinite without bound."""

    @abstractmethod
    def hit(
        self, origin: np.ndarray, directions: np.ndarray, t: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nearest intersections: ray parameter (N,), inf where missed, and material (N, 3)."""

    def locate(self, material: np.ndarray, t: float) -> np.ndarray:
        """Where material points (N, 3) are in space at time t, (N, 3)."""
        return self.shape(material, t) @ _rotation(self.turn, t).T + self.place(t)

    @abstractmethod
    def shape(self, material: np.ndarray, t: float) -> np.ndarray:
        """Where material points are in the body frame: the non-rigid part of the motion."""

    @abstractmethod
    def chart(self, material: np.ndarray) -> np.ndarray:
        """Texture coordinates (N, 2) of material points."""

    @abstractmethod
    def normal(self, material: np.ndarray, t: float) -> np.ndarray:
        """Unit normals (N, 3) in space."""

    def _local(
        self, origin: np.ndarray, directions: np.ndarray, t: float
    ) -> tuple[np.ndarray, np.ndarray]:
        rotation = _rotation(self.turn, t)
        return (origin - self.place(t)) @ rotation, directions @ rotation


@dataclass(frozen=True)
class Ellipsoid(Surface):
    """A ball whose three radii may change in time (`radii`); material is the unit sphere."""

    radii: Path = Path((0.5, 0.5, 0.5))

    @property
    def radius(self) -> float:  # noqa: D102
        return 1.1 * max(self.radii.start) + sum(max(wave[0]) for wave in self.radii.waves)

    def hit(  # noqa: D102
        self, origin: np.ndarray, directions: np.ndarray, t: float
    ) -> tuple[np.ndarray, np.ndarray]:
        o, d = (v / self.radii(t) for v in self._local(origin, directions, t))
        a, b, c = dot(d, d), d @ o, o @ o - 1
        root = np.sqrt(np.maximum(b * b - a * c, 0))
        depth = np.where(b * b > a * c, (-b - root) / a, np.inf)
        depth[depth < NEAR] = np.inf
        return depth, o + _finite(depth)[:, None] * d

    def shape(self, material: np.ndarray, t: float) -> np.ndarray:  # noqa: D102
        return material * self.radii(t)

    def chart(self, material: np.ndarray) -> np.ndarray:  # noqa: D102
        x, y, z = material.T
        uv = np.stack([np.arctan2(z, x) / np.pi, np.arcsin(y.clip(-1, 1)) / np.pi], axis=-1)
        return uv * max(1, round(self.repeats))

    def normal(self, material: np.ndarray, t: float) -> np.ndarray:  # noqa: D102
        return _unit(material / self.radii(t)) @ _rotation(self.turn, t).T


@dataclass(frozen=True)
class Box(Surface):
    """A rigid box of half-lengths `half`; material is the body frame."""

    half: tuple = (0.5, 0.5, 0.5)

    @property
    def radius(self) -> float:  # noqa: D102
        return float(np.linalg.norm(self.half))

    def hit(  # noqa: D102
        self, origin: np.ndarray, directions: np.ndarray, t: float
    ) -> tuple[np.ndarray, np.ndarray]:
        o, d = self._local(origin, directions, t)
        d = np.where(np.abs(d) < 1e-12, 1e-12, d)
        one, two = (-np.array(self.half) - o) / d, (np.array(self.half) - o) / d
        enter = np.maximum.reduce(np.minimum(one, two).T.copy())
        leave = np.minimum.reduce(np.maximum(one, two).T.copy())
        depth = np.where((enter < leave) & (enter > NEAR), enter, np.inf)
        return depth, o + _finite(depth)[:, None] * d

    def shape(self, material: np.ndarray, t: float) -> np.ndarray:  # noqa: D102
        return material

    def chart(self, material: np.ndarray) -> np.ndarray:  # noqa: D102
        axis = self._face(material)
        others = np.array([[1, 2], [0, 2], [0, 1]])[axis]
        side = np.sign(np.take_along_axis(material, axis[:, None], 1))
        return np.take_along_axis(material, others, 1) * self.repeats + 0.37 * side * (
            1 + axis[:, None]
        )

    def normal(self, material: np.ndarray, t: float) -> np.ndarray:  # noqa: D102
        axis = self._face(material)
        side = np.sign(np.take_along_axis(material, axis[:, None], 1))
        return side * _rotation(self.turn, t).T[axis]

    def _face(self, material: np.ndarray) -> np.ndarray:
        return np.abs(material / self.half).argmax(-1)


@dataclass(frozen=True)
class Ripple:
    """A non-rigid in-plane motion `p = u + sum_k a_k sin(k . u - w t + phase)`.

    waves: (amplitude (2,), wave vector k (2,) in radians per unit, w in radians per frame, phase).
    Invertible as long as the sum of |a_k| |k| stays below 1, which `__post_init__` checks.
    """

    waves: tuple = ()

    def __post_init__(self) -> None:
        steepness = sum(np.linalg.norm(a) * np.linalg.norm(k) for a, k, _, _ in self.waves)
        if steepness >= 0.8:
            raise ValueError(f"ripple of steepness {steepness:.2f} would fold: keep it below 0.8")

    def forward(self, u: np.ndarray, t: float) -> np.ndarray:
        """Deformed positions (N, 2) of material points (N, 2)."""
        p = u.copy()
        for a, k, w, phase in self.waves:
            p += np.multiply(a, np.sin(u @ k - w * t + phase)[:, None])
        return p

    def inverse(self, p: np.ndarray, t: float, steps: int = 12) -> np.ndarray:
        """Material points (N, 2) of deformed positions, by Newton iteration to rounding error."""
        px, py = p.T.copy()
        x, y = px.copy(), py.copy()
        for _ in range(steps if self.waves else 0):
            ex, ey = x - px, y - py
            xx, xy, yx, yy = 1.0, 0.0, 0.0, 1.0
            for (ax, ay), (kx, ky), w, phase in self.waves:
                angle = kx * x + ky * y + (phase - w * t)
                sine, cosine = np.sin(angle), np.cos(angle)
                ex, ey = ex + ax * sine, ey + ay * sine
                xx, xy = xx + ax * kx * cosine, xy + ax * ky * cosine
                yx, yy = yx + ay * kx * cosine, yy + ay * ky * cosine
            determinant = xx * yy - xy * yx
            dx, dy = (yy * ex - xy * ey) / determinant, (xx * ey - yx * ex) / determinant
            x, y = x - dx, y - dy
            # Newton converges quadratically: a step of 1e-5 leaves an error near 1e-10.
            if max(np.abs(dx).max(initial=0), np.abs(dy).max(initial=0)) < 1e-5:
                break
        return np.stack([x, y], axis=-1)

    def relief(self, u: np.ndarray, t: float) -> np.ndarray:
        """Slope (N, 2) of a height that goes with the waves, for shading only."""
        slope = np.zeros_like(u)
        for a, k, w, phase in self.waves:
            slope += np.multiply(k, (np.linalg.norm(a) * np.cos(u @ k - w * t + phase))[:, None])
        return slope


def _everywhere(u: np.ndarray) -> np.ndarray:
    return np.ones(len(u), bool)


@dataclass(frozen=True)
class Sheet(Surface):
    """A flat sheet in the body's xy plane, cut out by `covers(u (N, 2)) -> (N,) bool`, that may
    deform in its plane; material is (u, v, 0). Seen from both sides.

    extent: largest distance of a covered u from the body origin.
    """

    covers: Callable = _everywhere
    extent: float = np.inf
    ripple: Ripple = field(default_factory=Ripple)

    @property
    def radius(self) -> float:  # noqa: D102
        return self.extent + sum(float(np.linalg.norm(wave[0])) for wave in self.ripple.waves)

    def hit(  # noqa: D102
        self, origin: np.ndarray, directions: np.ndarray, t: float
    ) -> tuple[np.ndarray, np.ndarray]:
        o, d = self._local(origin, directions, t)
        slope = np.where(np.abs(d[:, 2]) < 1e-12, 1e-12, d[:, 2])
        depth = -o[2] / slope
        depth[depth < NEAR] = np.inf
        u = self.ripple.inverse((o + _finite(depth)[:, None] * d)[:, :2], t)
        depth[~self.covers(u)] = np.inf
        return depth, np.concatenate([u, np.zeros((len(u), 1))], axis=1)

    def shape(self, material: np.ndarray, t: float) -> np.ndarray:  # noqa: D102
        p = self.ripple.forward(material[:, :2], t)
        return np.concatenate([p, np.zeros((len(p), 1))], axis=1)

    def chart(self, material: np.ndarray) -> np.ndarray:  # noqa: D102
        return material[:, :2] * self.repeats

    def normal(self, material: np.ndarray, t: float) -> np.ndarray:  # noqa: D102
        slope = self.ripple.relief(material[:, :2], t)
        local = np.concatenate([-slope, -np.ones((len(slope), 1))], axis=1)
        return _unit(local) @ _rotation(self.turn, t).T


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products (N,) of rows; several times faster than a sum over a short axis."""
    return np.einsum("ni,ni->n", a, b)


def _rotation(turn: Path, t: float) -> np.ndarray:
    return Rotation.from_rotvec(turn(t)).as_matrix()


def _finite(depth: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(depth), depth, 0.0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(dot(vectors, vectors))[:, None]
