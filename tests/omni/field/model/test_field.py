from dataclasses import replace

import pytest
import torch

from omni.config import ModelConfig, RenderConfig, load_config
from omni.field.model.field import Field, LayerMap, Rays, SurfaceMap

FRAMES = 5
SMALL = ModelConfig(
    couplings=4, hidden=16, code_dim=8, grid_levels=2, grid_base=4, canonical_hidden=8, surface=8
)


def random_field(model=SMALL, dtype=torch.float64, **render):
    """A field none of whose parts is at its start."""
    torch.manual_seed(0)
    field = Field(FRAMES, model, RenderConfig(**render))
    for layer in field.bijection.couplings:
        torch.nn.init.normal_(layer.output.weight, std=0.3)
    with torch.no_grad():
        if field.motion is not None:
            field.motion.matrices.add_(0.1 * torch.randn_like(field.motion.matrices))
        if field.planes is not None:
            field.planes.values.add_(0.3 * torch.randn_like(field.planes.values))
        if field.surface is not None:
            field.surface.depth.add_(0.3 * torch.randn_like(field.surface.depth))
    return field.to(dtype)


def local_points(groups, count):
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(groups, count, 3, dtype=torch.float64, generator=generator)
    return torch.cat([2 * unit[..., :2] - 1, 2 * unit[..., 2:]], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("motion", ["affine", "none"])
@pytest.mark.parametrize("planes", [0, 3])
def test_source_to_target_to_source_closes_at_any_real_time(motion, planes):
    field = random_field(replace(SMALL, motion=motion, planes=planes))
    x = local_points(3, 40)
    source = torch.tensor([0.0, 1.5, 4.0], dtype=torch.float64)
    target = torch.tensor([3.0, 2.25, 0.0], dtype=torch.float64)
    there = field.from_canonical(target, field.to_canonical(source, x))
    back = field.from_canonical(source, field.to_canonical(target, there))
    assert (there - x).abs().max() > 0.05
    assert torch.allclose(back, x, atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_new_field_leaves_every_point_where_it_is():
    field, x = Field(FRAMES, SMALL, RenderConfig()), local_points(2, 30).float()
    there = field.from_canonical(
        torch.tensor([4.0, 1.0]), field.to_canonical(torch.tensor([0.0, 3.0]), x)
    )
    assert torch.allclose(there, x, atol=1e-6)


@torch.no_grad()
def test_stabilised_points_differ_from_local_ones_by_the_global_motion_alone():
    field, x = random_field(), local_points(2, 30)
    times = torch.tensor([0.0, 3.0], dtype=torch.float64)
    canonical = field.to_canonical(times, x)
    stable = field.from_canonical(times, canonical, stabilized=True)
    moved = x.clone()
    moved[..., :2] = field.stabilize(times, x)[..., :2]
    assert torch.allclose(stable, moved, atol=1e-10) and not torch.allclose(stable, x, atol=1e-2)


@torch.no_grad()
def test_a_ray_followed_to_its_own_time_stays_on_its_pixel():
    field = random_field()
    times, xy = torch.tensor([0.0, 2.5], dtype=torch.float64), local_points(2, 30)[..., :2]
    rays = field.cast(times, xy)
    reached, mapped = field.follow(rays, times)
    assert torch.allclose(reached[..., :2], xy, atol=1e-10)
    assert torch.allclose(mapped[..., 2], rays.depth, atol=1e-10)


@torch.no_grad()
def test_rays_sample_around_the_surface_map_or_the_whole_range():
    times, xy = torch.zeros(1, dtype=torch.float64), local_points(1, 30)[..., :2]
    guided = random_field(samples=4, half_width=0.2)
    rays = guided.cast(times, xy)
    assert torch.allclose(rays.depth.mean(-1), guided.surface.at(times, xy))
    assert rays.canonical.shape == (1, 30, 4, 3) and rays.weight.shape == (1, 30, 4)
    uniform = random_field(replace(SMALL, surface=0), samples=9).cast(times, xy)
    assert torch.allclose(uniform.depth[0, 0], torch.linspace(0, 2, 9, dtype=torch.float64))


@torch.no_grad()
def test_samples_mapped_out_of_the_depth_range_do_not_count():
    field = Field(FRAMES, replace(SMALL, motion="none"), RenderConfig())
    canonical = torch.tensor([[[[0.1, 0, 0], [0.3, 0, 0], [0.9, 0, 5.0]]]])
    rays = Rays(canonical, torch.ones(1, 1, 3), torch.full((1, 1, 3), 0.3), canonical, 0.1)
    reached, _ = field.follow(rays, torch.tensor([2.0]))
    assert reached[0, 0, 0].item() == pytest.approx(0.2, abs=1e-4)


def test_flow_gradient_reaches_mapping_code_motion_and_volume_but_not_the_surface_map():
    field = random_field()
    times, xy = torch.tensor([0.0, 2.0]).double(), local_points(2, 30)[..., :2]
    reached, _ = field.follow(field.cast(times, xy), times.flip(0))
    reached[..., :2].square().sum().backward()
    assert field.surface.depth.grad is None
    for name in ("bijection.code.points", "motion.matrices", "volume.encoding.params"):
        assert field.get_parameter(name).grad.abs().max() > 0, name
    for layer in field.bijection.couplings:
        assert layer.output.weight.grad.abs().max() > 0


def slow_surface(depth, t, x, y):
    """One point of a surface map, from bilinear sampling with cell centres at half cells."""
    grid = torch.tensor([[[[x, y]]]], dtype=depth.dtype)
    both = torch.nn.functional.grid_sample(
        depth[None], grid, align_corners=False, padding_mode="border"
    ).flatten()
    first = min(int(t), len(depth) - 2)
    return both[first] * (1 - (t - first)) + both[first + 1] * (t - first)


@torch.no_grad()
def test_surface_map_is_bilinear_in_space_and_linear_in_time():
    surface = SurfaceMap(FRAMES, 8).double().eval()
    surface.depth.copy_(torch.rand(FRAMES, 8, 8))
    for t in (0.0, 1.0, 2.25, 3.9, 4.0):
        for x, y in ((0.0, 0.0), (-0.37, 0.81), (0.99, -1.0), (3.0, -4.0)):
            got = surface.at(torch.tensor([t]).double(), torch.tensor([[[x, y]]]).double())
            assert got.item() == pytest.approx(
                slow_surface(surface.depth, t, x, y).item(), abs=1e-6
            )


def test_surface_map_has_a_gradient_to_depth_and_position():
    surface = SurfaceMap(FRAMES, 8).eval()
    torch.nn.init.normal_(surface.depth)
    xy = torch.tensor([[[0.1, 0.2]]], requires_grad=True)
    surface.at(torch.tensor([1.5]), xy).sum().backward()
    assert (surface.depth.grad != 0).sum() == 8 and xy.grad.abs().min() > 0


def test_gradients_of_the_surface_do_not_depend_on_the_number_of_threads():
    """Thousands of points share few cells, whose gradients are sums."""
    torch.manual_seed(0)
    surface, times = SurfaceMap(FRAMES, 4), 4 * torch.rand(64)
    xy, scale = 2 * torch.rand(64, 512, 2) - 1, torch.randn(64, 512)

    def gradient(threads):
        torch.set_num_threads(threads)
        surface.depth.grad = None
        (surface.at(times, xy) * scale).sum().backward()
        return surface.depth.grad

    try:
        assert all(torch.equal(gradient(4), gradient(1)) for _ in range(5))
    finally:
        torch.set_num_threads(1)


def test_the_paper_preset_has_the_paper_s_parameter_counts():
    """As counted in the released code: docs/method.md."""
    config = load_config("paper")
    field = Field(100, config.model, config.render)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(field.bijection.couplings) == 1_413_132
    assert count(field.bijection.projectors) == 198_144
    assert count(field.bijection.code) == 167_552
    assert count(field.volume) == 806_404
    assert field.motion is None and field.surface is None
    assert count(field) == 1_413_132 + 198_144 + 167_552 + 806_404


@torch.no_grad()
def test_the_paper_preset_s_field_is_invertible_from_its_random_start():
    config = load_config("paper")
    torch.manual_seed(0)
    field, x = Field(20, config.model, config.render).double(), local_points(2, 50)
    times = torch.tensor([0.0, 13.0], dtype=torch.float64)
    canonical = field.to_canonical(times, x)
    assert torch.allclose(field.from_canonical(times, canonical), x, atol=1e-10)


def test_a_layer_map_gives_the_nearest_cell_of_the_nearest_frame():
    layers = LayerMap(3, 4)
    with torch.no_grad():
        layers.depth.copy_(torch.arange(48.0).view(3, 4, 4))
    xy = torch.tensor([[[-0.99, -0.99], [-0.26, 0.01], [5.0, float("nan")]]]).expand(2, -1, -1)
    depth = layers.at(torch.tensor([0.4, 7.0]), xy)
    assert depth.tolist() == [[0, 9, 11], [32, 41, 43]]
    depth.sum().backward()
    assert (layers.depth.grad > 0).sum() == 6
