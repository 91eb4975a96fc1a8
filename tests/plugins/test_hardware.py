"""What the accelerators do with their hardware: for real where it is there, else against stand-ins for torch calls."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lightlite import accelerators, strategies
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator, Strategy
from lightlite.plugins import cuda, mps, nvml
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.cuda import CUDAAccelerator
from lightlite.plugins.ddp import DDPStrategy
from lightlite.plugins.mps import MPSAccelerator

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not CUDAAccelerator.is_available(), reason=str(CUDAAccelerator.unavailable_reason()))
needs_mps = pytest.mark.skipif(not MPSAccelerator.is_available(), reason=str(MPSAccelerator.unavailable_reason()))


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    for remembered in (nvml._handle, cuda._advise_once, mps._note_once):
        remembered.cache_clear()
    yield
    for remembered in (nvml._handle, cuda._advise_once, mps._note_once):
        remembered.cache_clear()


def test_cpu_figures_are_this_machines() -> None:
    stats = CPUAccelerator().get_device_stats(CPU)
    assert stats["process_memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert 0 < stats["memory_used_bytes"] < psutil.virtual_memory().total
    assert 0 <= stats["utilization_percent"] <= 100
    assert all(type(value) is float for value in stats.values())


def test_the_cpu_moves_no_batch_and_copies_no_parameter() -> None:
    accelerator, net = CPUAccelerator(), nn.Linear(2, 2)
    weight = net.weight.data_ptr()
    accelerator.move_module(net, CPU)
    assert net.weight.data_ptr() == weight
    assert accelerator.batch_mover(CPU) is None
    assert accelerator.random_state(CPU) is None
    assert CPUAccelerator.unavailable_reason() is None


def test_public_names_come_through_the_registry() -> None:
    assert accelerators.CPUAccelerator is CPUAccelerator
    assert accelerators.CUDAAccelerator is CUDAAccelerator
    assert accelerators.MPSAccelerator is MPSAccelerator
    assert accelerators.find_usable_cuda_devices is cuda.find_usable_cuda_devices
    assert strategies.DDPStrategy is DDPStrategy
    assert all(hasattr(accelerators, name) for name in accelerators.__all__)
    assert all(hasattr(strategies, name) for name in strategies.__all__)
    assert accelerators.Accelerator is Accelerator
    assert strategies.Strategy is Strategy
    with pytest.raises(ImportError, match="TPUs and XLA are left out"):
        accelerators.TPUAccelerator  # noqa: B018


def test_importing_the_public_modules_loads_no_plugin() -> None:
    code = (
        "import sys, lightlite.accelerators, lightlite.strategies\n"
        "assert not [name for name in sys.modules if name.startswith('lightlite.plugins')]\n"
        "import torch, lightlite.plugins.cuda, lightlite.plugins.mps, lightlite.plugins.ddp\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cuda_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without CUDA and ROCm" in str(CUDAAccelerator.unavailable_reason())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "no AMD GPU" in str(CUDAAccelerator.unavailable_reason())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert CUDAAccelerator.unavailable_reason() is None


def test_cuda_sets_the_device_first_and_advises_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    device = torch.device("cuda", 1)
    with caplog.at_level(logging.INFO):
        CUDAAccelerator().setup_device(device)
        CUDAAccelerator().setup_device(device)
    assert chosen == [device, device]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["A100"]


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "highest"), ((9, 0), "high")])
def test_cuda_advises_nothing_where_there_is_nothing_to_gain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    with caplog.at_level(logging.INFO):
        CUDAAccelerator().setup_device(torch.device("cuda", 0))
    assert caplog.records == []


class FakeNVML(ModuleType):
    """Stands in for `pynvml`: GPU "a" answers all but its power, which this user may not see."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, used: dict[str, int]) -> None:
        super().__init__("pynvml")
        self.used = used
        self.starts = 0

    def nvmlInit(self) -> None:
        self.starts += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.used:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=42)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self.used[handle], total=1000)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError("no permission")


def test_nvml_figures_leave_out_what_may_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNVML({"GPU-a": 300, "MIG-b": 100})
    monkeypatch.setitem(sys.modules, "pynvml", library)
    expected = {"utilization_percent": 42, "memory_used_bytes": 300, "memory_total_bytes": 1000}
    assert nvml.device_figures("a") == {**expected, "temperature_celsius": 61}
    assert nvml.device_figures("a")["memory_used_bytes"] == 300
    assert library.starts == 1
    assert nvml.device_figures("MIG-b")["memory_used_bytes"] == 100
    assert nvml.device_figures("unknown") == {}


def test_a_missing_or_broken_nvml_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.device_figures("a") == {}
    monkeypatch.undo()
    nvml._handle.cache_clear()
    if CUDAAccelerator.is_available():
        pytest.skip("NVML works here, so what it does without a driver cannot be seen")
    importlib.import_module("pynvml")
    assert nvml.device_figures("a") == {}


def test_cuda_figures_join_the_allocators_and_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML({"GPU-a": 300}))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocated_bytes.all.current": 7, "num_ooms": 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    stats = CUDAAccelerator().get_device_stats(torch.device("cuda", 0))
    assert stats["process_memory_bytes"] == 7
    assert stats["process_out_of_memory_errors"] == 1
    assert stats["memory_used_bytes"] == 300


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 0 is busy but usable, GPU 1 is held by somebody in exclusive mode, GPU 2 is free."""

    def zeros(size: Any, device: torch.device) -> None:
        if device.index == 1:
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML({"GPU-0": 900, "GPU-1": 500, "GPU-2": 10}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(device.index)))
    monkeypatch.setattr(torch, "zeros", zeros)


@pytest.mark.usefixtures("three_gpus")
def test_usable_gpus_come_freest_first() -> None:
    assert accelerators.find_usable_cuda_devices() == [2, 0]
    assert accelerators.find_usable_cuda_devices(1) == [2]
    assert accelerators.find_usable_cuda_devices(0) == []
    with pytest.raises(MisconfigurationException, match=r"only 2 of 3 GPUs can be used now \(\[2, 0\]\)"):
        accelerators.find_usable_cuda_devices(3)
    with pytest.raises(MisconfigurationException, match="PyTorch sees 3 GPUs; give at most that"):
        accelerators.find_usable_cuda_devices(4)


def test_mps_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert "built without MPS" in str(MPSAccelerator.unavailable_reason())
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    assert "Apple silicon" in str(MPSAccelerator.unavailable_reason())
    assert MPSAccelerator.auto_device_count() == 0


def test_mps_narrows_double_precision_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    accelerator, meta = MPSAccelerator(), torch.device("meta")
    net = nn.Linear(2, 2).double()
    net.register_buffer("phase", torch.ones(1, dtype=torch.complex128))
    accelerator.move_module(net, meta)
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32, torch.complex64}
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}
    mover = accelerator.batch_mover(meta)
    assert mover is not None
    moved = mover({"x": torch.ones(1, dtype=torch.float64), "y": torch.ones(1, dtype=torch.float16)})
    assert (moved["x"].dtype, moved["y"].dtype) == (torch.float32, torch.float16)
    assert len(caplog.records) == 1


def use_for_real(accelerator: Accelerator, device: torch.device) -> None:
    """What a run does with a device: module, batch, random state, figures."""
    accelerator.setup_device(device)
    accelerator.seed(3)
    net = nn.BatchNorm1d(2)
    accelerator.move_module(net, device)
    assert {tensor.device for tensor in net.state_dict().values()} == {device}
    mover = accelerator.batch_mover(device)
    assert mover is not None
    batch = mover([torch.ones(4, 2, dtype=torch.float64)])
    net(batch[0].float()).sum().backward()
    state = accelerator.random_state(device)
    first = torch.rand(3, device=device).cpu()
    accelerator.set_random_state(state, device)
    assert torch.equal(torch.rand(3, device=device).cpu(), first)
    accelerator.synchronize(device)
    assert accelerator.get_device_stats(device)["process_memory_bytes"] > 0
    accelerator.teardown()


@needs_cuda
def test_a_real_gpu_serves_a_run() -> None:
    use_for_real(CUDAAccelerator(), torch.device("cuda", 0))
    assert 0 in accelerators.find_usable_cuda_devices(-1)


@needs_mps
def test_a_real_mac_serves_a_run() -> None:
    use_for_real(MPSAccelerator(), torch.device("mps", 0))
