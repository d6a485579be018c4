import numpy as np
import pytest

from omni.field.initialisation import global_motion, surface_depth
from omni.maths.coords import denormalize, normalize, pixel_centers
from omni.maths.quantisation import Evidence

SIZE, FRAMES, THRESHOLD = (48, 64), 5, 1.5
MIDDLE = FRAMES // 2


def pose(t):
    """Pan and zoom: where background point p (normalised) of the middle frame is at time t."""
    since = t - MIDDLE
    return np.array(
        [[1 + 0.04 * since, 0, 0.1 * since], [0, 1 + 0.04 * since, 0.06 * since**2], [0, 0, 1]]
    )


def background(source, target):
    xy = pixel_centers(SIZE).astype(np.float64)
    step = pose(target) @ np.linalg.inv(pose(source))
    moved = normalize(xy, SIZE) @ step[:2, :2].T + step[:2, 2]
    return denormalize(moved, SIZE) - xy


def scattered(flow, rng):
    """30 % of all pixels point anywhere."""
    outlier = rng.uniform(size=SIZE) < 0.3
    return np.where(outlier[..., None], rng.uniform(-12, 12, flow.shape), flow)


def object_(flow, rng):
    """30 % of the frame is one object with a motion of its own."""
    moved = flow.copy()
    moved[8:40, 20:49] += (2.5, -1.5)
    return moved


@pytest.fixture
def store_with(write_store, tmp_path):
    def make(spoil):
        rng = np.random.default_rng(0)
        pairs = [(i, j) for i in range(FRAMES) for j in (i - 1, i + 1) if 0 <= j < FRAMES]
        yes, no = np.ones(SIZE, bool), np.zeros(SIZE, bool)
        reliable = {pair: Evidence(np.zeros(SIZE), no, yes) for pair in pairs}
        flows = {pair: spoil(background(*pair), rng) for pair in pairs}
        frames = np.zeros((FRAMES, *SIZE, 3), np.uint8)
        return write_store(tmp_path, frames, pairs, flows, reliable)

    return make


def corner_error(motion):
    """Largest error in pixels with which each map takes the frame's corners to the middle frame."""
    corners = np.array([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]], dtype=float)
    errors = []
    for t, matrix in enumerate(motion):
        true = corners @ np.linalg.inv(pose(t))[:2].T
        errors.append(np.abs((corners @ matrix.T - true) * (SIZE[1] / 2, SIZE[0] / 2)).max())
    return max(errors)


@pytest.mark.parametrize(
    "spoil, tolerance", [(lambda flow, rng: flow, 0.05), (scattered, 0.1), (object_, 0.25)]
)
def test_global_motion_recovers_pan_and_zoom_despite_30_percent_outliers(
    store_with, spoil, tolerance
):
    motion = global_motion(store_with(spoil), THRESHOLD)
    assert motion.shape == (FRAMES, 2, 3) and motion.dtype == np.float32
    assert np.allclose(motion[MIDDLE], np.eye(3)[:2])
    assert corner_error(np.tile(np.eye(3)[:2], (FRAMES, 1, 1))) > 2, "there is motion to find"
    assert corner_error(motion) < tolerance


def test_flows_without_a_reliable_pixel_give_the_identity(write_store, tmp_path):
    pairs = [(0, 1), (1, 0)]
    no = np.zeros(SIZE, bool)
    nothing = {pair: Evidence(np.zeros(SIZE), no, no) for pair in pairs}
    flows = {pair: background(*pair) for pair in pairs}
    store = write_store(tmp_path, np.zeros((2, *SIZE, 3), np.uint8), pairs, flows, nothing)
    assert np.array_equal(global_motion(store, THRESHOLD), np.tile(np.eye(3)[:2], (2, 1, 1)))


def test_what_moves_against_the_background_starts_nearer(store_with):
    store = store_with(object_)
    depth = surface_depth(store, global_motion(store, THRESHOLD), 16)
    assert depth.shape == (FRAMES, 16, 16)
    on_object = np.zeros(SIZE)
    on_object[8:40, 20:49] = 1
    inner = on_object.reshape(16, 3, 16, 4).mean((1, 3))
    assert depth[:, inner == 1].max() < 0.8 and depth[:, inner == 0].min() > 1.2


def test_a_static_scene_starts_at_one_depth(write_store, tmp_path):
    pairs = [(0, 1), (1, 0)]
    flows = {pair: np.zeros((*SIZE, 2)) for pair in pairs}
    store = write_store(tmp_path, np.zeros((2, *SIZE, 3), np.uint8), pairs, flows)
    depth = surface_depth(store, global_motion(store, THRESHOLD), 8)
    assert np.allclose(depth, 1.3, atol=1e-3)
