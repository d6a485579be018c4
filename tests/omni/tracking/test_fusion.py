import numpy as np
import pytest

from omni.maths.camera import Camera
from omni.tracking.fusion import FieldEstimate, bridge, fused_path
from omni.tracking.integration import LOOSE, LOST, STRICT, UNVERIFIED, Chains

FRAMES = 20
TIMES = np.arange(FRAMES)
GAP = slice(7, 13)
SIZE = (48, 64)
STILL = Camera(np.tile(np.eye(3)[:2], (FRAMES, 1, 1)), SIZE)


def path(count=4):
    """(N, T, 2) smooth, strongly curved paths."""
    phase = np.arange(count)[:, None] + TIMES / 3
    return np.stack([30 + 12 * np.cos(phase), 20 + 9 * np.sin(phase)], -1)


def line(count=4):
    speed = np.random.default_rng(0).uniform(-2, 2, (count, 1, 2))
    return 30 + speed * TIMES[:, None]


def levels(count=4, inside=LOST):
    level = np.full((count, FRAMES), STRICT)
    level[:, GAP] = inside
    return level


def spoilt(xy, level, by=70.0):
    """Chains have arbitrary positions where they are lost."""
    return np.where((level == LOST)[..., None], by, xy)


def chains_of(xy, level, frames, sigma=0.3):
    """States as `integrate` leaves them."""
    chains = Chains.start(FRAMES, frames, xy[np.arange(len(xy)), frames].astype(np.float32))
    known = level > UNVERIFIED
    chains.xy[:] = xy.transpose(1, 0, 2)
    chains.level[:] = level.T
    chains.sigma[:] = np.where(known, np.where(level == STRICT, sigma, 3.0), np.inf).T
    chains.error[:] = np.where(known, 0.1, np.inf).T
    chains.num_fused[:] = known.T
    query = frames, np.arange(len(xy))
    chains.sigma[query], chains.error[query] = 0, 0
    return chains


def field_at(xy):
    return FieldEstimate(xy.astype(np.float32), np.ones(xy.shape[:2], np.float32))


@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_a_field_off_by_a_constant_or_drifting_offset_bridges_a_gap_exactly(drift):
    truth, level = path(), levels()
    field = truth + [4.0, -3.0] + drift * TIMES[:, None]
    np.testing.assert_allclose(bridge(spoilt(truth, level), level > LOST, field), truth, atol=1e-4)


def test_without_a_field_the_bridge_is_a_straight_line_in_time():
    level = levels()
    np.testing.assert_allclose(bridge(spoilt(line(), level), level > LOST, None), line(), atol=1e-4)
    curved = bridge(spoilt(path(), level), level > LOST, None)
    np.testing.assert_allclose(np.diff(curved[:, 6:14], 2, axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(curved[:, [6, 13]], path()[:, [6, 13]], atol=1e-4)


def test_beyond_the_known_frames_position_or_offset_is_held():
    truth = path()
    level = np.full((4, FRAMES), LOST)
    level[:, 5:10] = STRICT
    plain = bridge(spoilt(truth, level), level > LOST, None)
    np.testing.assert_allclose(plain[:, :5], np.repeat(truth[:, 5:6], 5, 1), atol=1e-4)
    np.testing.assert_allclose(plain[:, 10:], np.repeat(truth[:, 9:10], 10, 1), atol=1e-4)
    guided = bridge(spoilt(truth, level), level > LOST, truth + [3.0, 8.0])
    np.testing.assert_allclose(guided, truth, atol=1e-4)


def test_a_bridge_meets_several_gaps_of_each_track_on_their_own():
    truth = path()
    level = np.where(np.random.default_rng(1).uniform(size=(4, FRAMES)) < 0.5, LOST, STRICT)
    level[:, 3] = STRICT
    np.testing.assert_allclose(
        bridge(spoilt(truth, level), level > LOST, truth - 2.0), truth, atol=1e-4
    )
    alone = [
        bridge(spoilt(truth, level)[n : n + 1], level[n : n + 1] > LOST, None) for n in range(4)
    ]
    np.testing.assert_array_equal(
        bridge(spoilt(truth, level), level > LOST, None), np.concatenate(alone)
    )


@pytest.mark.parametrize("with_field", [False, True])
@pytest.mark.parametrize("frame", [0, 9, 19])
def test_the_fused_path_passes_through_the_query(frame, with_field):
    rng = np.random.default_rng(2)
    noisy = path(40) + rng.normal(0, 0.4, (40, FRAMES, 2))
    query = path(40)[:, frame]
    noisy[:, frame] = query
    frames = np.full(40, frame)
    field = field_at(path(40) + rng.normal(0, 1.0, (40, FRAMES, 2))) if with_field else None
    level = np.full((40, FRAMES), STRICT)
    curves = fused_path(chains_of(noisy, level, frames), frames, STILL, field)
    distance = np.linalg.norm(curves.each_at(frames) - query, axis=-1)
    assert distance.max() < 0.1
    assert np.linalg.norm(noisy - path(40), axis=-1).mean() > 0.4


def test_fused_paths_bridge_a_gap_along_the_field():
    truth, level, frames = path(), levels(), np.zeros(4, int)
    chains = chains_of(spoilt(truth, level), level, frames)
    guided = fused_path(chains, frames, STILL, field_at(truth + [3.0, -3.0])).at(TIMES)
    straight = fused_path(chains, frames, STILL, None).at(TIMES)
    error = [np.linalg.norm(xy - truth, axis=-1) for xy in (guided, straight)]
    assert error[0][:, GAP].mean() < 0.3 * error[1][:, GAP].mean()
    known = level == STRICT
    assert max(e[known].mean() for e in error) < 0.2


def test_a_field_that_contradicts_a_strict_chain_does_not_move_it():
    truth, frames = path(), np.zeros(4, int)
    level = np.full((4, FRAMES), STRICT)
    chains = chains_of(truth, level, frames)
    alone = fused_path(chains, frames, STILL, None).at(TIMES)
    contradicted = fused_path(chains, frames, STILL, field_at(truth + 40)).at(TIMES)
    np.testing.assert_allclose(contradicted, alone, atol=1e-3)


def test_a_field_that_agrees_reduces_the_noise_of_a_chain():
    rng = np.random.default_rng(3)
    truth, frames = path(60), np.zeros(60, int)
    noisy = truth + rng.normal(0, 0.8, truth.shape)
    chains = chains_of(noisy, np.full((60, FRAMES), STRICT), frames, sigma=0.8)
    field = field_at(truth + rng.normal(0, 0.3, truth.shape))
    alone, both = (fused_path(chains, frames, STILL, field_).at(TIMES) for field_ in (None, field))
    mean = [np.linalg.norm(xy - truth, axis=-1).mean() for xy in (alone, both)]
    assert mean[1] < 0.9 * mean[0]


def test_loose_states_count_less_than_strict_ones():
    truth, frames = line(), np.zeros(4, int)
    off = truth.copy()
    off[:, GAP] += 2.5
    moved = {}
    for inside in (LOOSE, STRICT):
        curves = fused_path(
            chains_of(off, levels(inside=inside), frames), frames, STILL, field_at(truth)
        )
        moved[inside] = np.linalg.norm(curves.at(TIMES) - truth, axis=-1)[:, GAP].mean()
    assert moved[LOOSE] < 0.7 * moved[STRICT]


def test_a_point_known_at_its_query_alone_stays_there_or_follows_the_field():
    truth, frames = path(), np.array([3, 0, 19, 10])
    level = np.full((4, FRAMES), LOST)
    level[np.arange(4), frames] = STRICT
    chains = chains_of(spoilt(truth, level), level, frames)
    query = truth[np.arange(4), frames]
    still = fused_path(chains, frames, STILL, None).at(TIMES)
    np.testing.assert_allclose(still, np.repeat(query[:, None], FRAMES, 1), atol=0.01)
    followed = fused_path(chains, frames, STILL, field_at(truth + 5)).at(TIMES)
    assert np.linalg.norm(followed - truth, axis=-1).mean() < 0.3


@pytest.mark.parametrize("with_field", [False, True])
def test_an_unverified_chain_extends_a_path_but_never_bridges_a_gap(with_field):
    truth, frames = line(), np.full(4, 5)
    level = np.full((4, FRAMES), STRICT)
    level[:, GAP] = level[:, 16:] = UNVERIFIED
    unverified = truth.copy()
    unverified[:, GAP] += 6
    field = field_at(np.repeat(truth[:, 5:6], FRAMES, 1)) if with_field else None
    curves = fused_path(chains_of(unverified, level, frames), frames, STILL, field).at(TIMES)
    error = np.linalg.norm(curves - truth, axis=-1)
    assert error[:, 16:].max() < 0.3, "followed to the end"
    assert error[:, GAP].max() < 2, "bridged: there an unverified chain follows the occluder"


def test_a_field_counts_less_for_points_whose_strict_chain_it_misses():
    truth, frames = line(), np.zeros(4, int)
    level, pulled = np.full((4, FRAMES), STRICT), []
    for before in (0.0, 1.2):
        field = truth + 1.2
        field[:, :12] = truth[:, :12] + before
        curves = fused_path(chains_of(truth, level, frames), frames, STILL, field_at(field)).at(
            TIMES
        )
        pulled.append(np.linalg.norm(curves - truth, axis=-1)[:, 12:].mean())
    assert pulled[1] < 0.6 * pulled[0]


@pytest.fixture(scope="module")
def shaking():
    """Turns, zooms and jumps by several pixels from frame to frame."""
    rng = np.random.default_rng(4)
    maps = np.eye(3)[:2] + rng.normal(0, 0.02, (FRAMES, 2, 3))
    maps[..., 2] += rng.normal(0, 0.1, (FRAMES, 2))
    return Camera(maps, SIZE)


def test_camera_shake_is_kept_and_bridged_as_if_the_camera_stood_still(shaking):
    stabilised, level, frames = line(), levels(), np.zeros(4, int)
    truth = shaking.restore(stabilised, TIMES)
    assert np.abs(np.diff(truth - stabilised, axis=1)).mean() > 2, "the camera shakes"
    chains = chains_of(spoilt(truth, level), level, frames)
    np.testing.assert_allclose(
        fused_path(chains, frames, shaking, None).at(TIMES), truth, atol=0.02
    )
    field = field_at(shaking.restore(stabilised + [0.2, -0.1], TIMES))
    fused = fused_path(chains, frames, shaking, field).at(TIMES)
    assert np.linalg.norm(fused - truth, axis=-1).max() < 0.3
    np.testing.assert_allclose(shaking.stabilize(truth), stabilised, atol=1e-3)


def test_under_a_shaking_camera_too_the_fused_path_passes_through_the_query(shaking):
    frames = np.array([0, 7, 13, 19])
    truth = shaking.restore(path(), TIMES)
    chains = chains_of(truth, np.full((4, FRAMES), STRICT), frames)
    fused = fused_path(chains, frames, shaking, None)
    query = truth[np.arange(4), frames]
    np.testing.assert_allclose(fused.each_at(frames), query, atol=0.1)
    np.testing.assert_allclose(fused.at(TIMES)[np.arange(4), frames], query, atol=0.1)
