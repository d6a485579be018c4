"""Generated motion against an independent calculation, and against the pictures themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import fsolve
from scipy.spatial.transform import Rotation

from preprocess.training.random_scenes import draw_scenes
from preprocess.training.textures import TextureBank

SIZE = (48, 64)


@pytest.fixture(scope="module")
def bank():
    return TextureBank(10, seed=3)


def draw(bank, seeds, size=SIZE, longest=4.0):
    return draw_scenes([(9, seed) for seed in seeds], size, bank, [longest] * len(seeds), 7)


class BruteForce:
    """One scene in plain 3D: rays meet planes, one point and one surface at a time, in doubles."""

    def __init__(self, scenes, index):
        names = [name for name in vars(scenes) if name != "size"]
        self.p = {name: getattr(scenes, name)[index].double().numpy() for name in names}
        self.size = scenes.size
        self.count = len(self.p["origin"])

    def camera(self, t):
        return self.p["camera_velocity"] * t, Rotation.from_rotvec(self.p["camera_turn"] * t)

    def plane(self, k, t):
        spin = Rotation.from_rotvec(self.p["turn"][k] * t).as_matrix()
        axes = spin @ self.p["basis"][k] @ (np.eye(2) + self.p["stretch"][k] * t)
        return self.p["origin"][k] + self.p["velocity"][k] * t, axes

    def bent(self, k, u, t):
        """The displacement by each wave, all at the same chart point."""
        for wave in range(self.p["wave_phase"].shape[1]):
            angle = 2 * np.pi * self.p["wave_vector"][k, wave] @ u
            angle += self.p["wave_phase"][k, wave] + self.p["wave_rate"][k, wave] * t
            yield self.p["wave_amplitude"][k, wave] * np.sin(angle)

    def material(self, k, u, t):
        return u + sum(self.bent(k, u, t))

    def covers(self, k, m):
        level, aspect, ripple, power, bars, phase, width = self.p["outline"][k]
        form = min(abs(m[0] / aspect), 1e3) ** power + min(abs(m[1] * aspect), 1e3) ** power
        form += ripple * np.sin(5 * m[0] + phase) * np.sin(5 * m[1])
        return form <= level and abs((m[0] * bars + phase) % 1 - 0.5) <= width / 2

    def ray(self, xy, t):
        height, width = self.size
        eye, turned = self.camera(t)
        x, y = (xy - [width / 2, height / 2]) / self.p["focal"]
        return eye, turned.apply([x, y, 1.0])

    def meets(self, k, xy, t):
        """Distance along the ray (= camera depth) and chart point, or None."""
        eye, direction = self.ray(xy, t)
        origin, axes = self.plane(k, t)
        normal = np.cross(axes[:, 0], axes[:, 1])
        distance = normal @ (origin - eye) / (normal @ direction)
        if distance <= 0.05:
            return None
        point = eye + distance * direction
        u = np.linalg.lstsq(axes, point - origin, rcond=None)[0]
        return (distance, u) if self.covers(k, self.material(k, u, t)) else None

    def first(self, xy, t):
        met = {k: self.meets(k, xy, t) for k in range(self.count)}
        return min((k for k in met if met[k]), key=lambda k: met[k][0]), met

    def move(self, xy, source, target):
        """Where the point seen at `xy` goes, and whether anything hides it there."""
        k, met = self.first(xy, source)
        m = self.material(k, met[k][1], source)
        u = fsolve(lambda u: self.material(k, u, target) - m, m, xtol=1e-12)
        origin, axes = self.plane(k, target)
        eye, turned = self.camera(target)
        x, y, depth = turned.inv().apply(origin + axes @ u - eye)
        height, width = self.size
        landed = np.array([x, y]) / depth * self.p["focal"] + [width / 2, height / 2]
        inside = (landed >= 0).all() and (landed <= [width, height]).all()
        others = [self.meets(j, landed, target) for j in range(self.count) if j != k]
        hidden = any(other and other[0] < depth * (1 - 1e-5) for other in others)
        return landed - xy, inside and not hidden


def test_flow_and_visibility_equal_a_brute_force_calculation(bank):
    scenes = draw(bank, range(6))
    source, target = torch.full((6,), 1.0), torch.full((6,), 4.0)
    flow, visible, valid = scenes.flow(source, target)
    rng, hidden = np.random.default_rng(0), 0
    assert valid.all()
    for index in range(6):
        brute = BruteForce(scenes, index)
        suspects = np.argwhere(~visible[index].numpy())
        anywhere = np.stack([rng.integers(0, side, 40) for side in SIZE], -1)
        chosen = [anywhere, rng.permutation(suspects)[:30]]
        for row, column in np.concatenate(chosen):
            expected, seen = brute.move(np.array([column + 0.5, row + 0.5]), 1.0, 4.0)
            np.testing.assert_allclose(flow[index, row, column], expected, atol=5e-3)
            assert visible[index, row, column] == seen, (index, row, column)
            hidden += not seen
    assert hidden > 60


def test_flow_carries_the_first_picture_onto_the_second(bank):
    """Without shadow, light and blur, what is visible keeps its colour; a pixel off, not."""
    scenes = draw(bank, range(4), (72, 96), longest=2.0)
    still = torch.zeros_like
    plain = {"shadow": still(scenes.shadow), "light": still(scenes.light)}
    scenes = replace(scenes, **plain, shutter=still(scenes.shutter))
    times = torch.zeros(4), torch.full((4,), 2.0)
    first, second = (scenes.render(time, bank, 9) for time in times)
    flow, visible, _ = scenes.flow(*times)
    inner = ~F.max_pool2d((~visible).float()[:, None], 5, 1, 2).bool()[:, 0]

    def difference(shift):
        landed = scenes.centers.reshape(1, *scenes.size, 2) + flow + torch.tensor(shift)
        grid = landed / torch.tensor([96, 72]) * 2 - 1
        warped = F.grid_sample(second, grid, padding_mode="border", align_corners=False)
        return (warped - first).abs().mean(1)[inner].mean().item()

    exact = difference([0.0, 0.0])
    assert exact < 0.015
    for shift in ([1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]):
        assert difference(shift) > 1.5 * exact


def test_motion_of_three_frames_is_consistent(bank):
    """A point carried over the middle frame ends where the direct flow takes it."""
    scenes = draw(bank, range(4), (96, 128))
    times = [torch.full((4,), float(t)) for t in (0, 2, 4)]
    (near, seen, _), (far, *_) = (scenes.flow(times[0], t) for t in times[1:])
    hits = scenes.cast(scenes.centers, times[0])
    xy = scenes.centers + near.reshape(4, -1, 2)
    there = scenes.cast(xy, times[1])
    onward, _ = scenes.project(there, times[2])
    same = seen.reshape(4, -1) & (there.surface == hits.surface)
    gap = (onward - scenes.centers - far.reshape(4, -1, 2)).norm(dim=-1)[same]
    assert same.float().mean() > 0.8 and gap.max() < 0.02


def test_a_scene_depends_on_its_seed_alone(bank):
    together, alone = draw(bank, [5, 6]), draw(bank, [6])
    for name, values in vars(together).items():
        if name != "size":
            assert torch.equal(values[1], getattr(alone, name)[0]), name
    assert not torch.equal(together.origin[0], together.origin[1])


def test_scenes_differ_in_what_makes_flow_hard(bank):
    """Tiny and large motion, occlusion, thin and textureless things, blur, deformation, shadow."""
    scenes = draw(bank, range(60), longest=1.0)
    flow, visible, valid = scenes.flow(torch.zeros(60), torch.ones(60))
    speed = flow.norm(dim=-1).flatten(1).quantile(0.9, 1) / SIZE[1]
    assert (speed < 0.001).any() and (speed > 0.04).any()
    assert 0.01 < (~visible).float().mean() < 0.3 and valid.float().mean() > 0.99
    assert ((scenes.outline[..., 4] > 0) & (scenes.outline[..., 6] < 0.1)).any()
    assert 0.2 < (scenes.shutter > 0).float().mean() < 0.8
    contrast = scenes.paint[:, :, 0].abs().amax((-1, -2))
    assert (contrast < 0.06).any() and (contrast > 0.8).any()
    assert (scenes.wave_amplitude.abs() > 0.01).any() and scenes.shadow[:, 2].any()


def test_a_plane_seen_edge_on_is_seen_nowhere(bank):
    """Its matrix has no inverse, and nothing of that reaches flow or pictures."""
    scenes = draw(bank, range(2))
    basis, origin, outline = (getattr(scenes, n).clone() for n in ("basis", "origin", "outline"))
    basis[:, 0] = torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    origin[:, 0] = torch.tensor([0.0, 0, 4])
    edge_on = replace(scenes, basis=basis, origin=origin)
    outline[:, 0, 0] = -1e3
    without = replace(edge_on, outline=outline)
    times = torch.zeros(2), torch.full((2,), 4.0)
    assert (torch.linalg.det(edge_on.matrices(times[0]))[:, 0] == 0).all()
    hits = edge_on.cast(edge_on.centers, times[0])
    assert (hits.surface != 0).all() and hits.footprint.isfinite().all()
    for found, expected in zip(edge_on.flow(*times), without.flow(*times), strict=True):
        same = (found == expected).flatten(1).float().mean(1)
        assert found.isfinite().all() and (same > 0.9).all()  # it turns, and shows later
    torch.testing.assert_close(*(s.render(times[0], bank, 1) for s in (edge_on, without)))
    nowhere = replace(edge_on, outline=torch.full_like(outline, -1e3))
    flow, visible, valid = nowhere.flow(*times)
    assert flow.isfinite().all() and not visible.any() and not valid.any()
    assert nowhere.render(times[0], bank, 1).isfinite().all()


def test_blur_does_not_depend_on_the_direction_of_motion(bank):
    """A shutter run backwards gathers the same light, and sub-pixel samples as sharp a picture."""
    scenes, still = draw(bank, range(8), longest=1.0), torch.zeros(8, 7, 3)
    slide = torch.tensor([1.0, 0, 0]) * scenes.origin[..., 2:] / scenes.focal[:, None, None]
    scenes = replace(scenes, velocity=slide, turn=still, camera_velocity=still[:, 0])
    scenes = replace(scenes, camera_turn=still[:, 0], stretch=torch.zeros(8, 7, 2, 2))

    def sharpness(shutter):
        blurred = replace(scenes, shutter=torch.full((8,), shutter))
        return blurred.render(torch.zeros(8), bank, 6).diff(dim=-1).abs().mean().item()

    assert sharpness(0.9) == pytest.approx(sharpness(-0.9), rel=0.03)
