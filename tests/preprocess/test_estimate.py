import numpy as np
import pytest

from omni.errors import OmniError
from preprocess.estimate import Estimate, estimate_cost, file_bytes, fitting_workers, require_space
from preprocess.flow.dis import DisFlow
from preprocess.flow.pairs import schedule


def test_file_size_is_exact(tmp_path):
    arrays = {"flow": ((30, 12, 17, 2), np.int16), "evidence": ((30, 12, 17), np.uint8)}
    total = 0
    for name, (shape, dtype) in arrays.items():
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, dtype))
        total += (tmp_path / f"{name}.npy").stat().st_size
    assert file_bytes(arrays) == total


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path):
    arrays = {"flow": ((10**6, 10**4, 10**4, 2), np.int16)}
    folder = tmp_path / "run" / "store"
    with pytest.raises(OmniError, match=r"needs 400000\.0 GB more"):
        require_space(folder, arrays)
    assert not folder.parent.exists()
    require_space(folder, {"flow": ((2, 4, 4, 2), np.int16)})


def test_estimate_grows_with_pairs_and_reads_as_one_line():
    images = tuple(np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3), dtype=np.uint8))
    few, many = (
        estimate_cost(images, (48, 48), schedule(count, "log", 8), {}, DisFlow())
        for count in (4, 400)
    )
    assert 0 < few.seconds < many.seconds
    assert "\n" not in str(many)
    assert str(Estimate(1_900_000_000, 50_000_000, 660)) == (
        "1.9 GB on disk, 50.0 MB of memory, about 11 min"
    )


def test_only_as_many_threads_as_the_memory_holds():
    size, video = (480, 854), (1080, 1920)
    assert fitting_workers(16, size, video, 64 << 30) == 16
    assert fitting_workers(16, size, video, (600 << 20) + 12 * 1080 * 1920 + 3 * 200_000_000) == 3
    assert fitting_workers(16, size, video, 0) == 1
