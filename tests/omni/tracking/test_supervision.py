import numpy as np
import torch

from omni.tracking.supervision import chain_tracks, imported_tracks
from omni.tracking.tracks import Tracks


def test_chain_tracks_follow_both_layers_where_they_are_seen(small_store, scene):
    tracks = chain_tracks(small_store)
    start, seen = tracks.xy[:, 0].double().numpy(), tracks.seen.numpy() > 0
    true = np.stack([scene.track(start, 0, t) for t in range(scene.num_frames)], 1)
    assert seen[:, 0].all() and seen.mean() > 0.5 and not seen.all()
    distance = np.linalg.norm(tracks.xy.numpy() - true, axis=-1)[seen]
    assert np.median(distance) < 0.05 and np.quantile(distance, 0.9) < 0.5
    on_square = scene.on_square(start, 0)
    assert 0 < on_square.sum() < len(start)
    assert tracks.sigma.min() >= 0.25 and np.isfinite(tracks.sigma.numpy()).all()
    inside = ((tracks.xy >= 0) & (tracks.xy <= torch.tensor([32.0, 24.0]))).all(-1)
    assert inside[tracks.seen > 0].all()


def test_chain_tracks_start_throughout_a_longer_video(write_store, scene, tmp_path):
    """Nothing of the last frames can be seen in the first ones here: 20 frames, a cut at 10."""
    count, pairs = 20, []
    for t in range(count - 1):
        if t != 9:
            pairs += [(t, t + 1), (t + 1, t)]
    frames = np.zeros((count, *scene.size, 3), np.uint8)
    flows = {pair: np.zeros((*scene.size, 2), np.float32) for pair in pairs}
    tracks = chain_tracks(write_store(tmp_path, frames, pairs, flows))
    assert (tracks.seen.sum(0) > 0).all()
    first, last = tracks.seen[:, :10].any(1), tracks.seen[:, 10:].any(1)
    assert not (first & last).any()


def other_tracker(store, positions, visible, sigma):
    """Tracks in original pixels, twice the processing size, of positions at the latter."""
    return Tracks(
        tracks=(2 * positions).astype(np.float32),
        visible=visible,
        visibility=visible.astype(np.float32),
        sigma=sigma.astype(np.float32),
        query_points=np.zeros((len(positions), 3), np.float32),
        size=store.video_size,
        fps=25.0,
    )


def test_imported_tracks_are_not_visible_where_hidden_or_not_a_number(small_store):
    rng = np.random.default_rng(0)
    positions, visible = rng.uniform(2, 20, (5, 6, 2)), rng.uniform(size=(5, 6)) < 0.7
    visible[:, 0] = True
    positions[1, 0, 1], positions[2, 0] = np.nan, np.inf
    sigma = np.full((5, 6), np.nan)
    sigma[3] = 3.0
    tracks = imported_tracks(other_tracker(small_store, positions, visible, sigma), small_store)
    expected = visible.copy()
    expected[1, 0] = expected[2, 0] = False
    assert np.array_equal(tracks.seen.numpy(), expected.astype(np.float32))
    assert torch.isfinite(tracks.xy).all()
    np.testing.assert_allclose(tracks.xy.numpy()[expected], positions[expected], rtol=1e-6)
    np.testing.assert_allclose(tracks.sigma[3], 1.5, rtol=1e-6)
    np.testing.assert_allclose(tracks.sigma[[0, 1, 2, 4]], 0.5, rtol=1e-6)
