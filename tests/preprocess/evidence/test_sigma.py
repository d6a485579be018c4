import numpy as np
import pytest

from omni.maths.quantisation import decode_flow, encode_flow
from preprocess.evidence.sigma import LARGEST, calibrated, corrected, cycle_residuals
from preprocess.flow.pairs import schedule

GAPS = [1, 2, 4, 8]
SIZE = (40, 48)


@pytest.fixture
def noisy_store(write_store, tmp_path):
    """Flows of a still scene with Gaussian errors of a given size, and the store's lines."""

    def make(deviation, provider="dis-wide"):
        rng = np.random.default_rng(0)
        pairs = [tuple(map(int, pair)) for pair in schedule(17, "log", 8)]
        flows = {pair: rng.normal(0, deviation, (*SIZE, 2)).astype(np.float32) for pair in pairs}
        frames = np.zeros((17, *SIZE, 3), np.uint8)
        folder = tmp_path / f"{deviation}-{provider}"
        store = write_store(folder, frames, pairs, flows)
        store.manifest["stages"]["flow"]["meta"]["provider"] = provider
        return store

    return make


def test_every_gap_has_a_line_and_unknown_ones_that_of_the_nearest():
    lines = calibrated("dis-wide", [1, 2, 3, 32, 64])
    assert all(floor > 0 and slope > 0 and cycle >= 0 for floor, slope, cycle in lines.values())
    assert lines[64] == lines[32] and lines[3] in (lines[2], calibrated("dis-wide", [4])[4])


def test_a_provider_without_calibration_gets_the_numbers_of_the_fallback():
    assert calibrated("raft-large-12345678", GAPS) == calibrated("dis-wide", GAPS)


def test_a_noisier_video_gets_a_larger_sigma_and_a_cleaner_one_a_smaller(noisy_store):
    floors = []
    for deviation in (0.001, 0.05, 0.2):
        store = noisy_store(deviation)
        lines = corrected(store, store.evidence, 1.5)
        factors = [lines[g][1] / calibrated("dis-wide", GAPS)[g][1] for g in GAPS]
        assert all(1 / LARGEST - 0.01 <= factor <= LARGEST + 0.01 for factor in factors)
        floors.append(np.mean(factors))
    assert floors[0] < 0.6 and floors[2] > 1.2 and floors[0] < floors[1] < floors[2]


def test_cycle_residuals_are_the_disagreement_in_units_of_sigma(noisy_store):
    store = noisy_store(0.0)
    flow = store.flow
    pairs = store.pairs.tolist()
    for k, pair in enumerate(pairs):
        if pair[1] - pair[0] == 2:
            flow[k] = encode_flow(decode_flow(flow[k]) + np.float32([0.3, 0.4]))
    lines = {g: [0.5, 0.0, 0.0] for g in GAPS}
    residuals = cycle_residuals(store, store.evidence, 1.5, 2, lines)
    np.testing.assert_allclose(residuals, 0.5 / (0.5 * 3**0.5), atol=0.02)
    assert len(cycle_residuals(store, store.evidence, 1.5, 1, lines)) == 0
