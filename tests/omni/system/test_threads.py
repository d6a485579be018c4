import threading

import cv2
import pytest
import torch

from omni.system.threads import SMALLEST_PART, run_in_slices


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count, most", [(0, 10), (1, 10), (500, 10), (500, 1000), (700, 0)])
def test_parts_cover_everything_once_and_in_order(count, most):
    parts = run_in_slices(lambda rows: list(range(rows.start, rows.stop)), count, most, 1)
    assert sum(parts, []) == list(range(count))
    assert all(len(part) <= max(1, most) for part in parts)


def test_parts_run_side_by_side_and_use_one_core_each():
    together, seen = threading.Barrier(3, timeout=20), set()

    def work(rows):
        seen.add((torch.get_num_threads(), cv2.getNumThreads()))
        return together.wait()

    assert len(run_in_slices(work, 3 * SMALLEST_PART, 1000, 1)) == 3
    assert seen == {(1, 1)}


def test_few_items_are_done_by_the_caller_itself():
    assert (
        run_in_slices(lambda rows: threading.get_ident(), 10, 5, 1) == [threading.get_ident()] * 2
    )


def test_threads_are_given_back_when_a_part_fails():
    threads = cv2.getNumThreads()
    with pytest.raises(MemoryError):
        run_in_slices(fail, 1000, 10, 1)
    assert torch.get_num_threads() == 3 and cv2.getNumThreads() == threads


def test_no_more_threads_than_memory_holds(monkeypatch):
    monkeypatch.setattr("omni.system.threads.available_memory", lambda: 250)
    alive, most = [], []

    def work(rows):
        alive.append(rows)
        most.append(len(alive))
        threading.Event().wait(0.05)
        alive.remove(rows)

    run_in_slices(work, 1000, 100, 100)
    assert max(most) == 2
    most.clear()
    run_in_slices(work, 1000, 500, 1000)
    assert max(most) == 1


def fail(rows):
    raise MemoryError
