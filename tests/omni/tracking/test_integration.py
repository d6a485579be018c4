from dataclasses import replace

import numpy as np
import pytest

from omni.maths.coords import pixel_centers
from omni.tracking.integration import (
    LOOSE,
    LOST,
    STRICT,
    STRICT_ERROR,
    UNVERIFIED,
    Chains,
    fuse,
    integrate,
)
from omni.tracking.landmarks import Landmarks
from omni.tracking.links import Links
from preprocess.flow.pairs import schedule

CORRELATIONS = [0.0, 0.1, 0.25, 0.6, 0.9]


def log_pairs(num_frames, max_gap):
    return [tuple(map(int, pair)) for pair in schedule(num_frames, "log", max_gap)]


@pytest.fixture(scope="module")
def links_of(write_store, tmp_path_factory):
    """Links with the exact flows of a scene, forward or backward in time."""

    def make(scene, pairs, reverse=False):
        moment = (lambda t: scene.num_frames - 1 - t) if reverse else (lambda t: t)
        frames = np.stack([scene.frame(moment(t)) for t in range(scene.num_frames)])
        flows = {(i, j): scene.flow(moment(i), moment(j)) for i, j in pairs}
        return Links(write_store(tmp_path_factory.mktemp("store"), frames, pairs, flows))

    return make


@pytest.fixture(scope="module")
def small_links(small_store):
    return Links(small_store)


@pytest.fixture(scope="module")
def passing(scene):
    """A square that slides over a slowly panning background and away again, 1.8 px per frame."""

    class Passing(type(scene)):
        def background_pose(self, t):
            return np.eye(2), t * np.array([0.3, -0.1])

        def square_pose(self, t):
            return np.eye(2), t * np.array([-1.5, 0.0])

    return Passing(num_frames=16, size=(24, 40))


def anywhere(scene, count=200, seed=0):
    height, width = scene.size
    rng = np.random.default_rng(seed)
    return rng.uniform([1, 1], [width - 1, height - 1], (count, 2)).astype(np.float32)


def truth(scene, xy, frame):
    """(T, N, 2) true positions of points of one frame, and (T, N) whether they are occluded."""
    tracks = np.stack([scene.track(xy, frame, t) for t in range(scene.num_frames)])
    square = scene.on_square(xy, frame)
    occluded = [~square & scene.on_square(at, t) for t, at in enumerate(tracks)]
    return tracks, np.stack(occluded)


def away_from_borders(scene, xy, frame, margin=2.0):
    """(N,) points not within `margin` of the border between the layers."""
    around = margin * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1], [0, 1], [0, -1], [1, 0]])
    here = scene.on_square(xy, frame)
    return np.all([scene.on_square(xy + offset, frame) == here for offset in around], axis=0)


def solved(sigma, correlation):
    """Weights `C^-1 1 / 1^T C^-1 1` and sigma of the best linear unbiased estimate."""
    covariance = np.outer(sigma, sigma) * correlation
    np.fill_diagonal(covariance, sigma**2)
    weight = np.linalg.solve(covariance, np.ones(len(sigma)))
    return weight / weight.sum(), weight.sum() ** -0.5


def test_two_independent_sources_are_weighted_by_inverse_variance():
    xy = np.array([[[10, 20]], [[10.5, 19]]], np.float32)
    sigma = np.array([[0.5], [1.0]], np.float32)
    mean, deviation, num_fused, best = fuse(xy, sigma, correlation=0.0)
    np.testing.assert_allclose(mean, [[10.1, 19.8]], rtol=1e-6)
    np.testing.assert_allclose(deviation, [0.2**0.5], rtol=1e-6)
    assert num_fused == 2 and best == 0


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_correlated_sources_get_the_weights_of_generalised_least_squares(correlation, count):
    rng = np.random.default_rng(count)
    # So similar that no exact weight is negative, so near that none is an outlier.
    sigma = rng.uniform(1, 1 + 0.1 * (1 - correlation), (count, 50)).astype(np.float32)
    xy = rng.uniform(-0.5, 0.5, (count, 50, 2)).astype(np.float32) + 30
    mean, deviation, num_fused, _ = fuse(xy, sigma, correlation)
    for n in range(50):
        weight, expected = solved(sigma[:, n].astype(float), correlation)
        assert (weight > 0).all()
        np.testing.assert_allclose(mean[n], weight @ xy[:, n], rtol=1e-5)
        np.testing.assert_allclose(deviation[n], expected, rtol=1e-4)
    assert (num_fused == count).all()


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_fusion_is_never_worse_than_the_best_source_and_ignores_missing_ones(correlation):
    rng = np.random.default_rng(5)
    shape = (6, 4000)
    sigma = (10 ** rng.uniform(-1.5, 1.5, shape)).astype(np.float32)
    missing = rng.uniform(size=shape) < 0.4
    sigma[missing] = np.inf
    xy = rng.uniform(0, 3, (*shape, 2)).astype(np.float32)
    xy[missing] = 1e7
    mean, deviation, num_fused, best = fuse(xy, sigma, correlation)
    lowest, exists = sigma.min(0), ~missing.all(0)
    assert (deviation <= lowest * (1 + 1e-6)).all() and (deviation[exists] > 0).all()
    assert ((mean[exists] >= 0) & (mean[exists] <= 3)).all(), "a convex mix of those that exist"
    assert (num_fused <= (~missing).sum(0)).all() and (num_fused[exists] >= 1).all()
    assert np.array_equal(sigma[best, np.arange(4000)], lowest)
    assert (
        (~exists).any() and np.isinf(deviation[~exists]).all() and (num_fused[~exists] == 0).all()
    )


def test_a_source_whose_exact_weight_would_be_negative_is_left_out():
    xy = np.array([[[5, 5]], [[6, 5]]], np.float32)
    sigma = np.array([[1], [10]], np.float32)
    assert solved(sigma[:, 0], 0.5)[0].min() < 0
    mean, deviation, num_fused, _ = fuse(xy, sigma, correlation=0.5)
    assert np.array_equal(mean, [[5, 5]]) and deviation == 1 and num_fused == 1


def test_an_outlier_is_gated_and_the_rest_is_fused_as_without_it():
    rng = np.random.default_rng(6)
    xy = (rng.normal(0, 0.2, (4, 30, 2)) + 50).astype(np.float32)
    sigma = rng.uniform(0.5, 0.6, (4, 30)).astype(np.float32)
    far, poor = xy[:1] + np.float32([9, -9]), sigma[:1] + np.float32(0.3)
    both = np.concatenate([far, xy]), np.concatenate([poor, sigma])
    mean, deviation, num_fused, _ = fuse(*both, correlation=0.2)
    expected = fuse(xy, sigma, correlation=0.2)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6)
    np.testing.assert_allclose(deviation, expected[1], rtol=1e-6)
    assert (num_fused == 4).all()


def test_the_order_of_sources_does_not_matter():
    rng = np.random.default_rng(7)
    xy = rng.uniform(0, 3, (5, 300, 2)).astype(np.float32)
    sigma = rng.uniform(0.2, 3, (5, 300)).astype(np.float32)
    forward, backward = fuse(xy, sigma), fuse(xy[::-1], sigma[::-1])
    for a, b in zip(forward[:3], backward[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_certain_source_is_taken_as_it_is():
    """The query itself, sigma 0."""
    xy = np.array([[[5, 5]], [[6, 5]]], np.float32)
    mean, deviation, _, _ = fuse(xy, np.array([[0], [0.7]], np.float32))
    np.testing.assert_allclose(mean, [[5, 5]], atol=1e-4)
    assert deviation == 0


def test_at_the_start_every_state_but_the_queries_is_lost():
    frames, xy = np.array([2, 0]), np.array([[3, 4], [5, 6]], np.float32)
    chains = Chains.start(4, frames, xy)
    known = np.isfinite(chains.sigma)
    assert known.sum() == 2 and known[2, 0] and known[0, 1]
    assert np.array_equal(chains.xy[known], [[5, 6], [3, 4]])
    assert (chains.level[known] == STRICT).all() and (chains.level[~known] == LOST).all()


@pytest.mark.parametrize("frame", [0, 3, 5])
def test_queries_in_any_frame_are_followed_to_both_ends(small_links, scene, frame):
    xy = anywhere(scene, 400)
    xy = xy[away_from_borders(scene, xy, frame)]
    chains = integrate(small_links, np.full(len(xy), frame), xy)
    tracks, occluded = truth(scene, xy, frame)
    distance = np.linalg.norm(chains.xy - tracks, axis=-1)
    inner = ((tracks > 1) & (tracks < np.array(scene.size)[::-1] - 1)).all(-1)
    for t in range(scene.num_frames):
        clear = inner[t] & ~occluded[t] & away_from_borders(scene, tracks[t], t)
        assert clear.sum() > 100
        strict = clear & (chains.level[t] == STRICT)
        assert strict.sum() > 0.95 * clear.sum()
        assert np.quantile(distance[t, strict], 0.99) < 0.1
        assert (chains.error[t, strict] < 0.5).all() and np.isfinite(chains.sigma[t, strict]).all()
    assert np.array_equal(chains.xy[frame], xy) and (chains.sigma[frame] == 0).all()


@pytest.fixture(scope="module")
def occluded_for_a_while(passing):
    """Points of frame 0 that the square occludes for several frames, entirely and no longer."""
    xy = anywhere(passing, 1500)
    tracks, occluded = truth(passing, xy, 0)
    whole = (
        ~occluded[0] & ~occluded[-5:].any(0) & (occluded.sum(0) >= 5) & ~passing.on_square(xy, 0)
    )
    whole &= (abs(xy[:, 1] - 10) < 3) & away_from_borders(passing, xy, 0)
    whole &= ((tracks > 1) & (tracks < np.array(passing.size)[::-1] - 1)).all((0, 2))
    return xy[whole], tracks[:, whole], occluded[:, whole]


def test_a_point_comes_back_from_behind_an_occluder_as_itself(
    links_of, passing, occluded_for_a_while
):
    xy, tracks, occluded = occluded_for_a_while
    chains = integrate(links_of(passing, log_pairs(16, 8)), np.zeros(len(xy), int), xy)
    distance = np.linalg.norm(chains.xy - tracks, axis=-1)
    assert len(xy) > 20 and occluded.sum(0).max() <= 7
    deep = occluded & [away_from_borders(passing, at, t, 0.5) for t, at in enumerate(tracks)]
    assert deep.sum() > 0.8 * occluded.sum()
    assert not (chains.level[deep] == STRICT).any(), "no point is confused with the occluder"
    last = 15 - occluded[::-1].argmax(0)
    since = np.arange(16)[:, None] - last
    back = since >= 2
    assert (chains.level[back] == STRICT).all() and distance[back].max() < 0.5
    before = np.arange(16)[:, None] < occluded.argmax(0) - 1
    assert (chains.level[before] == STRICT).all() and distance[before].max() < 0.5
    loose = chains.level == LOOSE
    assert np.median(chains.sigma[occluded & loose]) > 1.2 * np.median(chains.sigma[back])


def test_without_links_across_the_occlusion_it_is_not_found_again(
    links_of, passing, occluded_for_a_while
):
    xy, _, _ = occluded_for_a_while
    chains = integrate(links_of(passing, log_pairs(16, 2)), np.zeros(len(xy), int), xy)
    assert not (chains.level[-1] == STRICT).any()


def test_one_link_to_the_end_of_the_video_recovers_the_frames_before_it_too(
    links_of, passing, occluded_for_a_while
):
    """Adjacent flows and one from the first frame to the last but one."""
    xy, tracks, occluded = occluded_for_a_while
    links = links_of(passing, [*log_pairs(16, 1), (0, 14), (14, 0)])
    chains = integrate(links, np.zeros(len(xy), int), xy)
    last = 15 - occluded[::-1].argmax(0)
    back = np.arange(16)[:, None] >= last + 2
    distance = np.linalg.norm(chains.xy - tracks, axis=-1)
    assert back[:14].any(0).all()
    assert (chains.level[back] == STRICT).all() and distance[back].max() < 0.5


def test_a_strict_candidate_is_not_mixed_with_a_loose_one(write_store, tmp_path):
    """Two links in a row are just within the strict tolerance; the direct one is not."""
    size, xy, little = (16, 16), np.array([[5, 8]], np.float32), STRICT_ERROR / 8
    just, not_quite = STRICT_ERROR - little, STRICT_ERROR + little
    motion = {(0, 1): 2.0, (1, 0): just - 2, (1, 2): 2.0, (2, 1): just - 2}
    motion |= {(0, 2): 5.0, (2, 0): not_quite - 5}
    flows = {pair: np.full((*size, 2), (x, 0.0)) for pair, x in motion.items()}
    frames = np.zeros((3, *size, 3), np.uint8)
    links = Links(write_store(tmp_path, frames, list(motion), flows))
    chains = integrate(links, np.zeros(1, int), xy)
    assert (chains.level[:, 0] == STRICT).all()
    np.testing.assert_allclose(chains.xy[2], [[9, 8]], atol=1e-3)


def test_where_no_link_is_consistent_the_adjacent_flow_gives_an_unverified_state(
    write_store, tmp_path
):
    size, xy = (16, 16), np.array([[5, 8]], np.float32)
    motion = {(0, 1): 2.0, (1, 0): -2.0, (1, 2): 3.0, (2, 1): 4.0, (2, 3): 1.0, (3, 2): -1.0}
    flows = {pair: np.full((*size, 2), (x, 0.0)) for pair, x in motion.items()}
    frames = np.zeros((4, *size, 3), np.uint8)
    chains = integrate(
        Links(write_store(tmp_path, frames, list(motion), flows)), np.zeros(1, int), xy
    )
    assert chains.level[:, 0].tolist() == [STRICT, STRICT, UNVERIFIED, UNVERIFIED]
    np.testing.assert_allclose(chains.xy[2:, 0], [[10, 8], [11, 8]], atol=1e-3)
    assert chains.sigma[3, 0] > chains.sigma[2, 0] > 5 * chains.sigma[1, 0]


@pytest.mark.parametrize("frame", [0, 15])
def test_a_video_run_backwards_gives_the_same_tracks_backwards(links_of, passing, frame):
    xy, pairs = anywhere(passing), log_pairs(16, 8)
    ahead = integrate(links_of(passing, pairs), np.full(200, frame), xy)
    reversed_ = integrate(links_of(passing, pairs, reverse=True), np.full(200, 15 - frame), xy)
    for name, values in vars(ahead).items():
        assert np.array_equal(values, getattr(reversed_, name)[::-1]), name


def test_a_video_run_backwards_gives_the_same_strict_tracks_from_its_middle(links_of, passing):
    """Not bit for bit: the sweep back in time also uses links from frames after the query."""
    xy, pairs = anywhere(passing), log_pairs(16, 8)
    ahead = integrate(links_of(passing, pairs), np.full(200, 7), xy)
    reversed_ = integrate(links_of(passing, pairs, reverse=True), np.full(200, 8), xy)
    assert (ahead.level == reversed_.level[::-1]).mean() > 0.98
    strict = (ahead.level == STRICT) & (reversed_.level[::-1] == STRICT)
    apart = np.linalg.norm(ahead.xy - reversed_.xy[::-1], axis=-1)[strict]
    assert np.quantile(apart, 0.99) < 0.2


def test_no_point_depends_on_the_others(small_links, scene):
    xy = anywhere(scene, 60)
    frames = np.random.default_rng(8).integers(0, scene.num_frames, 60)
    together = integrate(small_links, frames, xy)
    some = np.random.default_rng(9).permutation(60)[:13]
    for index in (some, some[:1]):
        part = integrate(small_links, frames[index], xy[index])
        for name, values in vars(together).items():
            assert np.array_equal(values[:, index], getattr(part, name)), name


def test_beyond_a_cut_every_point_stays_lost(links_of, scene):
    whole = replace(scene, num_frames=8)
    pairs = [(i, j) for i, j in log_pairs(8, 4) if (i < 4) == (j < 4)]
    links, xy = links_of(whole, pairs), anywhere(whole, 50)
    frames = np.repeat([1, 6], 25)
    chains = integrate(links, frames, xy)
    first = np.arange(8)[:, None] < 4
    beyond = first != (frames < 4)
    assert (chains.level[beyond] == LOST).all() and np.isinf(chains.sigma[beyond]).all()
    assert np.isfinite(chains.xy).all()
    assert (chains.level[~beyond] > LOST).mean() > 0.7


def test_a_point_that_leaves_the_frame_is_lost(small_links, scene):
    """Its flow still gives a position outside."""
    xy = np.array([[30.5, 12.0]], np.float32)
    tracks, _ = truth(scene, xy, 0)
    outside = tracks[:, 0, 0] > scene.size[1]
    assert outside.any() and not scene.on_square(xy, 0)
    chains = integrate(small_links, np.zeros(1, int), xy)
    assert (chains.level[outside, 0] == LOST).all()


def test_no_points_give_empty_chains(small_links):
    chains = integrate(small_links, np.zeros(0, int), np.zeros((0, 2), np.float32))
    assert chains.xy.shape == (6, 0, 2) and chains.level.shape == (6, 0)


@pytest.mark.parametrize("leap, found", [(7, True), (9, False)])
def test_a_point_is_not_found_again_at_a_repetition_far_from_where_it_was_seen(
    write_store, tmp_path, leap, found
):
    size, xy = (16, 32), np.array([[5, 8]], np.float32)
    flows = {pair: np.zeros((*size, 2)) for pair in [(0, 1), (1, 0), (2, 3), (3, 2)]}
    pattern = np.random.default_rng(0).integers(0, 255, (16, leap, 3), np.uint8)
    frame = np.tile(pattern, (1, 5, 1))[:, :32]
    store = write_store(tmp_path, np.stack([frame] * 4), list(flows), flows)
    here = pixel_centers(size).reshape(-1, 2)
    matches = np.concatenate([here, here + np.float32([leap, 0])], axis=1)
    arrays = {"landmarks": ((1, *matches.shape), np.float32)}
    with store.stage("landmarks", "k", arrays, 1) as stage:
        stage.arrays["landmarks"][0] = matches
        stage.meta["pairs"] = [[0, 3]]
    chains = integrate(Links(store), np.zeros(1, int), xy, Landmarks(store))
    assert chains.level[1, 0] == STRICT
    assert chains.level[3, 0] == (STRICT if found else LOST)
