import numpy as np
import pytest

from omni.tracking.smoothing import HUBER, ROUGHNESS, SPACING, TURN, _basis, _solve, fit_curves

FRAMES = 24
TIMES = np.arange(FRAMES)


def line(count=3, frames=FRAMES):
    rng = np.random.default_rng(0)
    start, speed = rng.uniform(0, 90, (count, 1, 2)), rng.uniform(-4, 4, (count, 1, 2))
    return start + speed * np.arange(frames)[:, None], speed


def any_weights(shape):
    """Weights over four orders of magnitude."""
    return 10 ** np.random.default_rng(1).uniform(-2, 2, shape)


def bands_of(matrices):
    """Main and three upper diagonals `(N, C, 4)` of symmetric matrices `(N, C, C)`."""
    bands = np.zeros((*matrices.shape[:2], 4))
    for d in range(4):
        bands[:, : matrices.shape[1] - d, d] = np.diagonal(matrices, d, 1, 2)
    return bands


@pytest.mark.parametrize("size", [4, 5, 19])
def test_the_banded_solver_agrees_with_a_dense_one(size):
    rng = np.random.default_rng(size)
    rows = np.triu(np.tril(rng.normal(size=(6, size, size)), 3))
    dense = rows @ rows.transpose(0, 2, 1) + 0.1 * np.eye(size)
    assert np.allclose(dense, np.tril(np.triu(dense, -3), 3)), "three bands on either side"
    right = rng.normal(size=(6, size, 2))
    bands, untouched = bands_of(dense), right.copy()
    np.testing.assert_allclose(_solve(bands, right), np.linalg.solve(dense, right), rtol=1e-6)
    assert np.array_equal(right, untouched) and np.array_equal(bands, bands_of(dense))


def test_the_curve_solves_the_dense_normal_equations_where_nothing_is_an_outlier():
    rng = np.random.default_rng(2)
    xy = line()[0]
    weight = any_weights(xy.shape[:2])
    noise = rng.uniform(-1, 1, xy.shape) * np.minimum(0.02 * HUBER, 0.05 * TURN)
    curves = fit_curves(xy + noise, weight)
    count = curves.control.shape[1]
    basis, second = _basis(TIMES, SPACING, count), np.diff(np.eye(count), 2, axis=0)
    for n, w in enumerate(weight):
        normal = basis.T @ (w[:, None] * basis) + ROUGHNESS * second.T @ second
        expected = np.linalg.solve(normal, basis.T @ (w[:, None] * (xy + noise)[n]))
        np.testing.assert_allclose(curves.control[n], expected, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 3, 4, 5, FRAMES])
def test_a_straight_line_is_reproduced_exactly_with_any_weights_and_between_frames(frames):
    xy, speed = line(frames=frames)
    curves = fit_curves(xy, any_weights(xy.shape[:2]))
    times = np.linspace(0, frames - 1, 41)
    expected = xy[:, :1] + speed * times[:, None]
    np.testing.assert_allclose(curves.at(times), expected, atol=1e-3)


def test_a_cubic_is_reproduced_where_measurements_outweigh_roughness():
    t = TIMES[:, None] / FRAMES
    xy = (np.array([50, -30]) * t**3 + np.array([-60, 40]) * t**2 + np.array([20, 5]) * t)[None]
    curves = fit_curves(xy, 1e3 * any_weights((1, FRAMES)))
    np.testing.assert_allclose(curves.at(TIMES), xy, atol=5e-3)


def test_smoothing_removes_jitter():
    rng = np.random.default_rng(3)
    angle = TIMES[:, None] / 6
    truth = np.concatenate([40 * np.cos(angle), 25 * np.sin(angle)], 1)[None].repeat(50, 0)
    noisy = truth + rng.normal(0, 0.5, truth.shape)
    smooth = fit_curves(noisy, np.full(truth.shape[:2], 2.0)).at(TIMES)
    assert np.square(smooth - truth).mean() < 0.8 * np.square(noisy - truth).mean()


def test_a_sharp_turn_is_kept():
    """With a squared penalty of the same weight the curve would cut the corner by 4.4 px."""
    away = np.abs(TIMES - FRAMES // 2)[:, None]
    xy = (away * np.array([[6.0, -4.0]]))[None]
    off = np.linalg.norm(fit_curves(xy, np.ones((1, FRAMES))).at(TIMES) - xy, axis=-1)
    assert off.max() < 1


def test_ten_percent_gross_outliers_hardly_move_the_curve():
    """Plain least squares is 1.4 px off in the median and 3.7 px on average."""
    rng = np.random.default_rng(4)
    xy, _ = line(200)
    wrong = rng.uniform(size=xy.shape[:2]) < 0.1
    spoilt = xy + wrong[..., None] * rng.normal(0, 40, xy.shape)
    curves = fit_curves(spoilt, np.full(xy.shape[:2], 10.0))
    distance = np.linalg.norm(curves.at(TIMES) - xy, axis=-1)
    assert np.linalg.norm(spoilt - xy, axis=-1)[wrong].mean() > 40
    assert np.median(distance) < 0.15 and distance[~wrong].mean() < 1.5


def test_an_unweighted_measurement_does_not_matter():
    xy, _ = line()
    weight = np.ones(xy.shape[:2])
    weight[:, 9:12] = 1e-9
    spoilt = xy.copy()
    spoilt[:, 9:12] += 300
    np.testing.assert_allclose(fit_curves(spoilt, weight).at(TIMES), xy, atol=0.01)


def test_tracks_do_not_influence_each_other():
    rng = np.random.default_rng(5)
    xy, weight = rng.uniform(0, 50, (5, FRAMES, 2)), any_weights((5, FRAMES))
    together = fit_curves(xy, weight).at(TIMES)
    for n in range(5):
        alone = fit_curves(xy[n : n + 1], weight[n : n + 1])
        np.testing.assert_allclose(alone.at(TIMES)[0], together[n], atol=1e-4)


@pytest.fixture(scope="module")
def winding():
    """Curves through random positions: as uneven as curves get."""
    xy = np.random.default_rng(6).uniform(0, 50, (5, FRAMES, 2))
    return fit_curves(xy, np.full(xy.shape[:2], 100.0))


def test_a_curve_and_its_slope_are_continuous_at_frames_and_knots(winding):
    step = 1e-3
    moments = np.concatenate([np.arange(1, FRAMES - 1), np.arange(SPACING, FRAMES - 1.5, SPACING)])
    before, at, after = (winding.at(moments + d) for d in (-step, 0, step))
    np.testing.assert_allclose(before, at, atol=0.1)
    np.testing.assert_allclose((after - at) / step, (at - before) / step, atol=0.5)
    times = np.linspace(1, FRAMES - 2, 200)
    steepest = np.abs(np.gradient(winding.at(times), times, axis=1)).max()
    assert steepest > 10, "the curve moves"


def test_each_at_takes_every_track_at_its_own_time(winding):
    times = np.array([0, 3.5, 7, 22.9, 23])
    expected = winding.at(times)[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(winding.each_at(times), expected, atol=1e-5)
