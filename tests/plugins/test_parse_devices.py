from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.cuda import CUDAAccelerator
from lightlite.plugins.mps import MPSAccelerator

NONSENSE: list[Any] = [0, "0", -2, "", " ", "two", "1.5", "0,x", ",", "-1,0"]
NONSENSE += [[], [-1], [0, True], ["0"], {0}, b"1", True, None, 1.5]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.fixture
def one_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("devices", "processes"),
    [(1, 1), (3, 3), ("2", 2), ("auto", 1), (-1, 1), ("-1", 1), ([0], 1), ([1, 3], 2), ("0,3", 2), ("5,", 1)],
)
def test_cpu_devices_are_processes(devices: Any, processes: int) -> None:
    parsed = CPUAccelerator.parse_devices(devices)
    assert parsed == list(range(processes))
    assert CPUAccelerator.get_parallel_devices(parsed) == [torch.device("cpu")] * processes


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        ("auto", [0, 1, 2, 3]),
        ("2", [0, 1]),
        ("2,", [2]),
        ("0,2", [0, 2]),
        (" 3, 1 ", [3, 1]),
        ([0, 2], [0, 2]),
        ((1,), [1]),
        (range(2), [0, 1]),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_cuda_devices_are_indices(devices: Any, indices: list[int]) -> None:
    assert CUDAAccelerator.parse_devices(devices) == indices
    assert CUDAAccelerator.get_parallel_devices(indices) == [torch.device("cuda", index) for index in indices]


@pytest.mark.parametrize("devices", [1, -1, "auto", "1", [0], "0,"])
@pytest.mark.usefixtures("one_mps")
def test_mps_has_one_device(devices: Any) -> None:
    assert MPSAccelerator.parse_devices(devices) == [0]
    assert MPSAccelerator.get_parallel_devices([0]) == [torch.device("mps", 0)]


@pytest.mark.parametrize("devices", NONSENSE, ids=repr)
@pytest.mark.parametrize("accelerator", [CPUAccelerator, CUDAAccelerator, MPSAccelerator])
@pytest.mark.usefixtures("four_gpus", "one_mps")
def test_nonsense_is_refused_with_what_was_given_and_what_is_allowed(accelerator: Any, devices: Any) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        accelerator.parse_devices(devices)
    assert f"devices={devices!r}" in str(caught.value)
    assert '"auto"' in str(caught.value)


@pytest.mark.parametrize("devices", [[0, 0], "1,1"])
@pytest.mark.usefixtures("four_gpus")
def test_a_device_named_twice_is_refused(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="more than once"):
        CUDAAccelerator.parse_devices(devices)


@pytest.mark.parametrize(
    ("devices", "advice"), [(5, "devices=4"), ([0, 4], r"devices=\[0, 1, 2, 3\]"), ("7,", r"devices=\[0, 1, 2, 3\]")]
)
@pytest.mark.usefixtures("four_gpus")
def test_more_gpus_than_there_are_says_how_many_and_what_to_type(devices: Any, advice: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"4 GPUs, with indices 0 to 3; use at most {advice}"):
        CUDAAccelerator.parse_devices(devices)


def test_gpus_where_there_are_none_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0b1c")
    with pytest.raises(MisconfigurationException, match=r"no GPU, with CUDA_VISIBLE_DEVICES='GPU-0b1c'.*accelerator="):
        CUDAAccelerator.parse_devices(2)


@pytest.mark.parametrize("devices", [2, [1], [0, 1], "4"])
@pytest.mark.usefixtures("one_mps")
def test_more_than_one_mps_device_says_why(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="a Mac has one GPU"):
        MPSAccelerator.parse_devices(devices)


@pytest.fixture
def torch_chooses_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As in a program that nobody has told a number of threads. Gives the number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    yield cores
    torch.set_num_threads(before)


@pytest.mark.parametrize("accelerator", [CPUAccelerator(), CUDAAccelerator()])
def test_threads_are_the_cores_of_this_process_divided_by_its_ranks(
    accelerator: Accelerator, torch_chooses_threads: int
) -> None:
    assert accelerator.threads_per_rank(1) is None
    assert accelerator.threads_per_rank(2) == max(1, torch_chooses_threads // 2)
    assert accelerator.threads_per_rank(10 * torch_chooses_threads) == 1


def test_threads_that_the_user_chose_are_kept_on_every_rank(
    torch_chooses_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3 * torch_chooses_threads)
    assert CPUAccelerator().threads_per_rank(2) == 3 * torch_chooses_threads
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    assert CPUAccelerator().threads_per_rank(2) is None
