"""Fixtures of the tests of the fit."""

from dataclasses import replace

import pytest


@pytest.fixture(scope="session")
def tiny_config(small_config):
    """Enough to test the loop, however badly it fits."""
    return replace(
        small_config,
        model=replace(small_config.model, couplings=2, hidden=8, grid_levels=2, grid_log2_size=10),
        render=replace(small_config.render, samples=2),
        sampling=replace(small_config.sampling, pairs=4, points=8),
    )
