import cv2
import numpy as np
import pytest
import torch

from omni.system import memory
from omni.system.memory import available_memory, out_of_memory

GIB = 1 << 30
MACHINE = {"/proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {20 << 20} kB"}
NESTED = "/sys/fs/cgroup/jobs.slice/job7"
V1 = "/sys/fs/cgroup/memory"


def group(folder, limit, used, prefix="", names=("memory.max", "memory.current"), **stat):
    stat = "\n".join(f"{prefix}{name}_file {value}" for name, value in stat.items())
    values = (str(limit), str(used), stat)
    return dict(zip((f"{folder}/{n}" for n in (*names, "memory.stat")), values, strict=True))


def v1(folder, limit, used, **stat):
    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
    return group(folder, limit, used, "total_", names, **stat)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 20 * GIB),
        (
            {
                "/proc/self/cgroup": "0::/",
                **group("/sys/fs/cgroup", 8 * GIB, 7 * GIB, inactive=3 * GIB, active=2 * GIB),
            },
            6 * GIB,
        ),
        (
            {
                "/proc/self/cgroup": "0::/jobs.slice/job7",
                **group(NESTED, "max", 5 * GIB),
                **group("/sys/fs/cgroup/jobs.slice", 4 * GIB, 3 * GIB, inactive=GIB),
            },
            2 * GIB,
        ),
        (
            {
                "/proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n0::/",
                **v1(V1, 3 * GIB, 2 * GIB, inactive=GIB // 2, active=0),
                "/sys/fs/cgroup/memory/memory.max": "1",
            },
            GIB + GIB // 2,
        ),
        (
            {
                "/proc/self/cgroup": "4:cpu,memory:/job",
                **v1(f"{V1}/job", 2 * GIB, 3 * GIB),
                **v1(V1, (1 << 63) - 4096, 9 * GIB),
            },
            0,
        ),
    ],
    ids=["machine", "v2 with cache", "limit of a parent", "v1 seen from a container", "v1 nested"],
)
def test_available_memory_is_the_least_that_machine_and_groups_leave(monkeypatch, files, expected):
    files = {**MACHINE, **files}
    monkeypatch.setattr(memory, "_text", lambda path: files.get(str(path), ""))
    assert available_memory() == expected


def test_where_the_system_does_not_say_all_there_is_counts(monkeypatch):
    monkeypatch.setattr(memory, "_text", lambda path: "")
    assert available_memory() > GIB // 2


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(1 << 60, np.uint8),
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: cv2.copyMakeBorder(
            np.zeros((4, 4, 4)), 0, (1 << 31) - 10, 0, (1 << 25), cv2.BORDER_REPLICATE
        ),
    ],
    ids=["numpy", "torch", "opencv"],
)
def test_running_out_of_memory_is_distinguished_from_other_errors(allocate):
    with pytest.raises(Exception) as caught:
        allocate()
    assert out_of_memory(caught.value), caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("Insufficient memory.mp4 is not a video"), False),
    ],
)
def test_errors_of_a_gpu(error, expected):
    assert out_of_memory(error) == expected
