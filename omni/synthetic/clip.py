"""Seeded synthetic clips with exact dense tracks, visibility and flow.

    clip = make_clip("demo", frames=32, size=(192, 256), seed=0)
    tracks, visible = clip.track(np.array([[0, 96.5, 128.5]]))

A scene is a camera and analytic surfaces (`omni.synthetic.surfaces`). Pixels are cast into it to
find material points, and material points are projected back at any time; whether one is visible is
decided by a ray through exactly that point. Nothing is rasterised but the picture.
"""

import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np

from omni.errors import OmniError
from omni.maths import grid_queries, inside, pixel_centers
from omni.synthetic.scene import Scene
from omni.synthetic.scenes import SCENES
from omni.synthetic.surfaces import Sheet, Surface, dot
from omni.system import write_atomic

__all__ = ["SCENES", "SyntheticClip", "make_clip"]

BEHIND = 1e-5
"""relative depth by which a point may lie behind the surface its own ray meets, for rounding"""
SAMPLES = np.array([[-3, -1], [1, -3], [3, 1], [-1, 3]]) / 8
"""sub-pixel offsets of the samples averaged into one pixel (rotated grid)"""
BLUR_ROUNDS = 2
"""times the samples are taken through an open shutter"""
LAMP = np.array([-0.45, -0.7, -0.55]) / np.linalg.norm([-0.45, -0.7, -0.55])
"""direction to the lamp: upper left, behind the camera"""
AMBIENT = 0.45
"""brightness without the lamp"""


@dataclass(frozen=True)
class Hits:
    """What N rays meet first.

    depth: (N,) camera depth, inf where nothing; index: (N,) surface, -1 where nothing;
    material: (N, 3) material coordinates on that surface.
    """

    depth: np.ndarray
    index: np.ndarray
    material: np.ndarray


@dataclass(frozen=True)
class SyntheticClip:
    """A rendered scene and its exact geometry at every time.

    Attributes:
        name, seed: what was rendered.
        scene: camera and surfaces.
        video: (T, H, W, 3) uint8 RGB.
    """

    name: str
    seed: int
    scene: Scene
    video: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.video.shape[1:3]

    def track(self, query_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact trajectories of whatever surface is seen at the queries.

        Args:
            query_points: (N, 3) t, y, x; frames (may be fractional) and raster pixels.

        Returns:
            (N, T, 2) float64 raster pixels, NaN behind the camera, and (N, T) bool visible: in
            the frame and hidden by nothing.
        """
        query_points = np.asarray(query_points, np.float64)
        times = np.arange(len(self.video))
        tracks = np.full((len(query_points), len(times), 2), np.nan)
        visible = np.zeros(tracks.shape[:2], bool)
        for t in np.unique(query_points[:, 0]):
            chosen = np.flatnonzero(query_points[:, 0] == t)
            hits = _cast(self.scene, query_points[chosen, :0:-1], t)
            for time in times.tolist():
                tracks[chosen, time], visible[chosen, time] = _follow(self.scene, hits, time)
        return tracks, visible

    @cached_property
    def _hits(self) -> list[Hits]:
        """What every pixel centre of every frame sees."""
        return [_cast(self.scene, self._centers, t) for t in range(len(self.video))]

    @cached_property
    def _flow(self) -> tuple[np.ndarray, np.ndarray]:
        moved = [_follow(self.scene, hits, t + 1) for t, hits in enumerate(self._hits[:-1])]
        flow = np.stack([xy - self._centers for xy, _ in moved]).astype(np.float32)
        valid = np.stack([seen for _, seen in moved])
        return flow.reshape(-1, *self.size, 2), valid.reshape(-1, *self.size)

    @property
    def _centers(self) -> np.ndarray:
        return pixel_centers(self.size).reshape(-1, 2).astype(np.float64)

    @cached_property
    def segmentation(self) -> np.ndarray:
        """(T, H, W) uint8: 0 background, else 1 + index of the object at the pixel centre."""
        first = len(self.scene.background) - 1
        labels = [np.maximum(hits.index - first, 0).reshape(self.size) for hits in self._hits]
        return np.stack(labels).astype(np.uint8)

    @property
    def flow_fwd(self) -> np.ndarray:
        """(T-1, H, W, 2) float32 pixels from each pixel centre at t to the same point at t+1."""
        return self._flow[0]

    @property
    def flow_valid(self) -> np.ndarray:
        """(T-1, H, W) bool: the point is still visible at t+1."""
        return self._flow[1]

    def queries(self, count: int) -> np.ndarray:
        """(count, 3) float32 pixel centres of random frames, half of them on objects."""
        rng = np.random.default_rng((self.seed, 1))
        on_object = np.argwhere(self.segmentation > 0)
        anywhere = np.argwhere(self.segmentation >= 0)
        parts = [on_object[rng.integers(len(on_object), size=count // 2)]]
        parts.append(anywhere[rng.integers(len(anywhere), size=count - count // 2)])
        return np.concatenate(parts).astype(np.float32) + np.array([0, 0.5, 0.5], np.float32)

    def save_clip(self, path: FilePath | str, points: int = 256) -> None:
        """Write video and truth as a compressed `.npz`, atomically.

        Arrays: video, query_points, tracks, visible; dense_query, dense_tracks, dense_visible
        (stride-4 grid of frame 0); segmentation, flow_fwd (float16), flow_valid, meta (JSON).

        Raises:
            OmniError: the file cannot be written.
        """
        queries, dense = self.queries(points), grid_queries(self.size, 0, 4)
        tracks, visible = self.track(queries)
        dense_tracks, dense_visible = self.track(dense)
        meta = {"name": self.name, "seed": self.seed, "flow": "xy(t+1) - xy(t), pixels"}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            video=self.video,
            query_points=queries,
            tracks=tracks.astype(np.float32),
            visible=visible,
            dense_query=dense,
            dense_tracks=dense_tracks.astype(np.float32),
            dense_visible=dense_visible,
            segmentation=self.segmentation,
            flow_fwd=self.flow_fwd.astype(np.float16),
            flow_valid=self.flow_valid,
            meta=json.dumps(meta),
        )
        try:
            write_atomic(FilePath(path), buffer.getvalue())
        except OSError as error:
            raise OmniError(f"cannot write {path} ({error.strerror}): choose another") from None


def make_clip(
    name: str,
    frames: int = 32,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
    shutter: float | None = None,
) -> SyntheticClip:
    """Render a scene of `SCENES`; the same arguments give the same bytes.

    Args:
        name: key of `SCENES`.
        frames: number of frames, at least 2.
        size: (H, W).
        seed: of textures and motion.
        shutter: fraction of a frame that the shutter is open, None for the scene's own.

    Raises:
        OmniError: no scene of that name, or fewer than 2 frames.
    """
    if name not in SCENES:
        raise OmniError(f"there is no synthetic scene {name!r}: choose one of {', '.join(SCENES)}")
    if frames < 2:
        raise OmniError(f"a clip needs at least 2 frames, not {frames}")
    scene = SCENES[name](size, np.random.default_rng(seed))
    if shutter is not None:
        scene = replace(scene, shutter=shutter)
    video = np.stack([_render(scene, t) for t in range(frames)])
    return SyntheticClip(name, seed, scene, video)


def _cast(scene: Scene, xy: np.ndarray, t: float) -> Hits:
    """What rays through raster pixels (N, 2) meet first at time t."""
    origin, directions = scene.camera.rays(xy, t)
    depth, index = np.full(len(xy), np.inf), np.full(len(xy), -1)
    material = np.zeros((len(xy), 3))
    for number, surface in enumerate(scene.surfaces):
        near = _near(surface, origin, directions, t)
        found, where = surface.hit(origin, directions[near], t)
        closer = found < depth[near]
        chosen = near[closer]
        depth[chosen], index[chosen], material[chosen] = found[closer], number, where[closer]
    return Hits(depth, index, material)


def _near(surface: Surface, origin: np.ndarray, directions: np.ndarray, t: float) -> np.ndarray:
    """Rays that come near enough to a surface to hit it."""
    if not np.isfinite(surface.radius):
        return np.arange(len(directions))
    offset = surface.place(t) - origin
    squared = dot(directions, directions)
    miss = (offset @ offset) * squared - (directions @ offset) ** 2
    return np.flatnonzero(miss <= surface.radius**2 * squared)


def _follow(scene: Scene, hits: Hits, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the material points of N hits are at time t, (N, 2), and whether they are visible."""
    xy, depth = np.full((len(hits.index), 2), np.nan), np.full(len(hits.index), np.nan)
    for number, surface in enumerate(scene.surfaces):
        chosen = np.flatnonzero(hits.index == number)
        points = surface.locate(hits.material[chosen], t)
        xy[chosen], depth[chosen] = scene.camera.project(points, t)
    visible = inside(xy, scene.camera.size)
    seen = np.flatnonzero(visible)
    first = _cast(scene, xy[seen], t).depth
    visible[seen] = depth[seen] <= first * (1 + BEHIND)
    return xy, visible


def _render(scene: Scene, t: float) -> np.ndarray:
    """(H, W, 3) uint8 frame: several samples per pixel, at times over the open shutter."""
    centers = pixel_centers(scene.camera.size).reshape(-1, 2).astype(np.float64)
    offsets = np.tile(SAMPLES, (BLUR_ROUNDS if scene.shutter else 1, 1))
    times = t + scene.shutter * ((np.arange(len(offsets)) + 0.5) / len(offsets) - 0.5)
    image = np.zeros((len(centers), 3))
    for offset, time in zip(offsets, times, strict=True):
        image += _shade(scene, _cast(scene, centers + offset, time), time)
    image *= 255 / len(offsets) * scene.gain(t)
    return image.clip(0, 255).round().astype(np.uint8).reshape(*scene.camera.size, 3)


def _shade(scene: Scene, hits: Hits, t: float) -> np.ndarray:
    """(N, 3) colours in [0, 1] of hits, black where there is nothing."""
    colors = np.zeros((len(hits.index), 3))
    for number, surface in enumerate(scene.surfaces):
        chosen = np.flatnonzero(hits.index == number)
        material = hits.material[chosen]
        footprint = surface.repeats * hits.depth[chosen] / scene.camera.scale(t)
        color = surface.texture.sample(surface.chart(material), footprint)
        light: float | np.ndarray = 1.0
        if scene.shading:
            light = 1 - scene.shading * (1 - _light(scene, surface, material, t))
        colors[chosen] = color * np.reshape(light, (-1, 1))
    return colors


def _light(scene: Scene, surface: Surface, material: np.ndarray, t: float) -> np.ndarray:
    """(N,) brightness from a distant lamp, with soft round shadows of the solid objects."""
    points, normals = surface.locate(material, t), surface.normal(material, t)
    facing = dot(normals, scene.camera.place(t) - points)
    diffuse = np.maximum(np.sign(facing) * (normals @ LAMP), 0)
    shadow = np.ones(len(points))
    for other in scene.objects:
        if other is surface or isinstance(other, Sheet):
            continue
        offset = other.place(t) - points
        ahead = offset @ LAMP
        miss = np.sqrt(np.maximum(dot(offset, offset) - ahead**2, 0)) / other.radius
        shadow *= 1 - 0.55 * np.clip((1.15 - miss) / 0.6, 0, 1) * np.clip(ahead, 0, 1)
    return AMBIENT + (1.15 - AMBIENT) * diffuse * shadow
