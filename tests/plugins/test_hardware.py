"""What the accelerators do with their hardware: for real where it is there, else against stand-ins for torch calls."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lightlite import Trainer, accelerators, strategies
from lightlite.demos.boring_classes import BoringModel
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
    remembering = (nvml._handle, nvml._starts, cuda._advise_once, mps._note_once)
    for remembered in remembering:
        remembered.cache_clear()
    yield
    for remembered in remembering:
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


def test_cuda_is_told_which_algorithms_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    CUDAAccelerator().set_algorithms(deterministic=False, benchmark=None)
    assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cudnn.benchmark) == (None, False)
    CUDAAccelerator().set_algorithms(deterministic=True, benchmark=True)
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.backends.cudnn.benchmark) == (":4096:8", True)


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

    def nvmlDeviceGetCount(self) -> int:
        raise self.NVMLError("no permission")

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
    nvml._starts.cache_clear()
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


def test_cuda_tells_of_the_whole_devices_memory_without_nvml_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    stats = CUDAAccelerator().get_device_stats(torch.device("cuda", 0))
    assert (stats["memory_used_bytes"], stats["memory_total_bytes"]) == (70, 100)


def test_an_amd_gpus_figures_come_by_amdsmi_as_far_as_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def untold(device: torch.device) -> float:
        raise ModuleNotFoundError("amdsmi does not seem to be installed")

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 42)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 250)
    monkeypatch.setattr(torch.cuda, "temperature", untold)
    stats = CUDAAccelerator().get_device_stats(torch.device("cuda", 0))
    whole = {name: value for name, value in stats.items() if not name.startswith("process_")}
    assert whole == {
        "utilization_percent": 42,
        "power_watts": 250,
        "memory_used_bytes": 70,
        "memory_total_bytes": 100,
    }


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
def test_gpus_of_which_nvml_does_not_tell_all_are_tried_out_and_come_freest_first() -> None:
    assert accelerators.find_usable_cuda_devices() == [2, 0]
    assert accelerators.find_usable_cuda_devices(1) == [2]
    assert accelerators.find_usable_cuda_devices(0) == []
    with pytest.raises(MisconfigurationException, match=r"only 2 of 3 GPUs can be used now \(\[2, 0\]\)"):
        accelerators.find_usable_cuda_devices(3)
    with pytest.raises(MisconfigurationException, match="PyTorch sees 3 GPUs; give at most that"):
        accelerators.find_usable_cuda_devices(4)


SIDE, MAIN = "side", "main"


class FakeStreams:
    """Stands in for CUDA's streams: notes what is queued on which, in order. Copies go to the meta device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[tuple[str, ...]] = []
        self.current = MAIN
        streams = self
        to = torch.Tensor.to

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def record_event(self) -> str:
                streams.queued.append((self.name, "record"))
                return f"event of {self.name}"

            def wait_event(self, event: str) -> None:
                streams.queued.append((self.name, f"wait for {event}"))

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, streams.current = streams.current, chosen.name
            yield
            streams.current = before

        def copy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            moved = to(tensor, *args, **kwargs)
            if moved is not tensor:
                streams.queued.append((streams.current, "copy"))
            return moved

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(SIDE))
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(streams.current))
        monkeypatch.setattr(torch.Tensor, "to", copy)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, used_on: streams.queued.append((used_on.name, "keeps"))
        )


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStreams]:
    cuda._side_stream.cache_clear()
    yield FakeStreams(monkeypatch)
    cuda._side_stream.cache_clear()


def test_cuda_copies_on_a_side_stream_and_has_the_computing_stream_wait_and_keep_the_memory(
    streams: FakeStreams,
) -> None:
    meta = torch.device("meta")
    begin = CUDAAccelerator().background_mover(meta)
    assert begin is not None
    x = torch.ones(2)
    moved = begin({"x": x, "again": x, "label": [torch.zeros(1, dtype=torch.int64), "a name"]})
    copies = [(SIDE, "copy"), (SIDE, "copy"), (SIDE, "record")]
    assert streams.queued == copies
    batch = moved()
    assert streams.queued == [*copies, (MAIN, "wait for event of side"), (MAIN, "keeps"), (MAIN, "keeps")]
    assert batch["x"] is batch["again"]
    assert (batch["x"].device, batch["label"][0].device, batch["label"][1]) == (meta, meta, "a name")
    assert CUDAAccelerator().background_mover(meta) is begin


def test_cuda_moves_on_the_computing_stream_what_it_does_not_know_to_be_safe_beside_it(streams: FakeStreams) -> None:
    meta = torch.device("meta")
    begin = CUDAAccelerator().background_mover(meta)
    assert begin is not None
    packed = nn.utils.rnn.pack_sequence([torch.ones(2)])
    there, parameter = torch.ones(1, device=meta), nn.Parameter(torch.ones(1))
    moved = begin([packed, there, parameter])
    assert streams.queued == [(SIDE, "record")]
    batch = moved()
    assert [queue for queue, _ in streams.queued] == [SIDE, *[MAIN] * (len(streams.queued) - 1)]
    assert (MAIN, "copy") in streams.queued
    assert (MAIN, "keeps") not in streams.queued
    assert batch[0].data.device == batch[2].device == meta
    assert batch[1] is there


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


UNSUPPORTED = NotImplementedError("The operator 'aten::foo' is not currently implemented for the MPS device. …")


@pytest.mark.parametrize(
    ("variable", "error", "advice"),
    [
        (None, UNSUPPORTED, "start the script as `PYTORCH_ENABLE_MPS_FALLBACK=1 python"),
        ("1", UNSUPPORTED, "was set after PyTorch had been imported"),
        (None, NotImplementedError("the user's own"), None),
        (None, RuntimeError("for the MPS device"), None),
    ],
)
def test_an_operator_that_mps_lacks_is_explained(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, error: Exception, advice: str | None
) -> None:
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if variable is not None:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", variable)
    told = MPSAccelerator().advice(error)
    assert told == "" if advice is None else advice in told


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11; before, it is logged")
def test_what_a_device_says_of_an_error_is_noted_on_it() -> None:
    class Advising(CPUAccelerator):
        def advice(self, error: BaseException) -> str:
            return f"do not {error}" if isinstance(error, ValueError) else ""

    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("fail")

    with pytest.raises(ValueError, match="fail") as caught:
        Trainer(accelerator=Advising(), devices=1, fast_dev_run=True, enable_model_summary=False).fit(Failing())
    assert caught.value.__notes__ == ["do not fail"]


def use_for_real(accelerator: Accelerator, device: torch.device) -> None:
    """What a run does with a device: module, batch, random state, figures."""
    accelerator.setup_device(device)
    torch.manual_seed(3)
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
