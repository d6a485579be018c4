import numpy as np
import pytest
from tqdm import tqdm

from omni.store import Store
from preprocess.parallel import run_items


def test_groups_are_fixed_and_one_that_was_cut_short_is_done_again_whole(tmp_path):
    levels, calls = [list(range(5)), [5, 6]], []
    arrays = {"values": ((7,), np.int64)}

    def work(group):
        calls.append(list(group))
        for item in group:
            stage.arrays["values"][item] = item * len(group)

    def interrupted(group):
        if 4 in group:
            raise KeyboardInterrupt
        work(group)

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        with store.stage("values", "k", arrays, 7) as stage:
            run_items(stage, levels, interrupted, 1, tqdm(disable=True), batch=2)
    with store.stage("values", "k", arrays, 7) as stage:
        stage.done[3] = 0  # as if the process had died between the two
        bar = tqdm(total=7, initial=int(stage.done.sum()), disable=True)
        run_items(stage, levels, work, 1, bar, batch=2)
    assert calls == [[0, 1], [2, 3], [2, 3], [4], [5, 6]]
    assert np.load(tmp_path / "store" / "values.npy").tolist() == [0, 2, 4, 6, 4, 10, 12]
