"""NVIDIA GPUs through CUDA, and AMD GPUs through ROCm, which PyTorch serves under the same names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightlite import distributed
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator
from lightlite.nest import apply_to_tensors, move_to
from lightlite.plugins import nvml, peak_flops
from lightlite.plugins.devices import ALL, read_devices, share_of_cores

_log = logging.getLogger(__name__)
_AMPERE = (8, 0)


class CUDAAccelerator(Accelerator):
    """GPUs, one to a process. Indices are PyTorch's: positions among the devices that CUDA_VISIBLE_DEVICES leaves."""

    name = "cuda"
    process_group_backend = "nccl"
    pin_memory = True

    @staticmethod
    def is_available() -> bool:
        """Whether PyTorch sees a GPU."""
        return CUDAAccelerator.auto_device_count() > 0

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why there is no GPU to use; None where there is."""
        if cls.is_available():
            return None
        if torch.version.cuda is None and torch.version.hip is None:
            return f"this PyTorch ({torch.__version__}) was built without CUDA and ROCm"
        for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            if variable in os.environ:
                return f"PyTorch sees no GPU, with {variable}={os.environ[variable]!r}"
        maker = "AMD" if torch.version.hip else "NVIDIA"
        return f"PyTorch sees no {maker} GPU: there is none, or its driver does not work"

    @staticmethod
    def auto_device_count() -> int:
        """How many GPUs PyTorch sees; it asks NVML where it can, which leaves CUDA uninitialised."""
        return torch.cuda.device_count()

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Indices of the GPUs meant: see `Accelerator.parse_devices`."""
        wanted, count = read_devices(devices), CUDAAccelerator.auto_device_count()
        if count == 0:
            raise MisconfigurationException(
                f"devices={devices!r} was asked of cuda, but {CUDAAccelerator.unavailable_reason()}; "
                'use accelerator="auto" to take what there is, or accelerator="cpu"'
            )
        if wanted == ALL:
            return list(range(count))
        indices = wanted if isinstance(wanted, list) else list(range(wanted))
        if max(indices) >= count:
            there = "1 GPU, with index 0" if count == 1 else f"{count} GPUs, with indices 0 to {count - 1}"
            advice = f"devices={count}" if isinstance(wanted, int) else f"devices={list(range(count))}"
            raise MisconfigurationException(
                f'devices={devices!r} was asked of cuda, but PyTorch sees {there}; use at most {advice}, or "auto"'
            )
        return indices

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """`cuda:index` for each index."""
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    def find_usable_devices(num_devices: int = -1) -> list[int]:
        """Indices of GPUs on which this process can allocate, those with the least memory in use first.

        GPUs in exclusive-process mode that another process holds are left out. Where NVML tells all that, CUDA is not
        initialised. Otherwise each GPU is tried out, for which it is, with a few hundred megabytes on each.

        As in Lightning, `Trainer(devices=find_usable_cuda_devices(2))` takes the two freest.

        Args:
            num_devices: How many; -1 for all that are usable.

        Raises:
            MisconfigurationException: Where there are none, or fewer are usable.
        """
        count = CUDAAccelerator.auto_device_count()
        if count == 0:
            raise MisconfigurationException(
                f"find_usable_cuda_devices({num_devices}): {CUDAAccelerator.unavailable_reason()}"
            )
        if not -1 <= num_devices <= count:
            raise MisconfigurationException(
                f"find_usable_cuda_devices({num_devices}): PyTorch sees {count} GPUs; give at most that, or -1 for all"
            )
        standings = [nvml.standing(index) for index in range(count)]
        told = {index: standing for index, standing in enumerate(standings) if standing is not None}
        if len(told) < count:  # CUDA itself has to be asked
            told = {index: nvml.Standing(_memory_in_use(index), False) for index in range(count)}
        usable: list[int] = []
        for index in sorted(told, key=lambda index: told[index].memory_used_bytes):
            if len(usable) != num_devices and not told[index].is_held and (None not in standings or _is_usable(index)):
                usable.append(index)
        if len(usable) < num_devices:
            raise MisconfigurationException(
                f"find_usable_cuda_devices({num_devices}): only {len(usable)} of {count} GPUs can be used now "
                f"({usable}); the others are held by other processes"
            )
        return usable

    def setup_device(self, device: torch.device) -> None:
        """Make `device` current, so that nothing is allocated on GPU 0 by mistake."""
        torch.cuda.set_device(device)
        _advise_on_matmul_precision(device)

    def teardown(self) -> None:
        """Give cached memory back to the device."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def set_algorithms(self, deterministic: bool, benchmark: bool | None) -> None:
        """CuBLAS's workspace, without which it is not deterministic, and cuDNN's trials."""
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if benchmark is not None:
            torch.backends.cudnn.benchmark = benchmark

    def batch_mover(self, device: torch.device) -> Callable[[Any], Any] | None:
        """Copies that do not wait, from batches in page-locked memory; kernels queued after them see their result."""
        return partial(move_to, device=device, non_blocking=True)

    def background_mover(self, device: torch.device) -> Callable[[Any], Callable[[], Any]] | None:
        """Copies on a stream of their own, which do not wait for what the GPU has been given to compute."""
        return _side_stream(device)

    def random_state(self, device: torch.device) -> Any:
        """The generator's state, a byte tensor on the CPU."""
        return torch.cuda.get_rng_state(device)

    def set_random_state(self, state: Any, device: torch.device) -> None:
        """Put back what `random_state` returned."""
        torch.cuda.set_rng_state(state.cpu(), device)

    def synchronize(self, device: torch.device) -> None:
        """Wait for every stream of the device."""
        torch.cuda.synchronize(device)

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """PyTorch's allocator with the prefix "process_", and NVML's figures of the whole GPU where it tells them."""
        stats = torch.cuda.memory_stats(device)
        figures = {
            "process_memory_bytes": stats.get("allocated_bytes.all.current", 0),
            "process_memory_peak_bytes": stats.get("allocated_bytes.all.peak", 0),
            "process_memory_reserved_bytes": stats.get("reserved_bytes.all.current", 0),
            "process_memory_reserved_peak_bytes": stats.get("reserved_bytes.all.peak", 0),
            "process_allocation_retries": stats.get("num_alloc_retries", 0),
            "process_out_of_memory_errors": stats.get("num_ooms", 0),
        }
        return {**{name: float(value) for name, value in figures.items()}, **_whole_device(device)}

    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """What NVIDIA's data sheet says of the GPU; None, with a warning, where it is not known here."""
        return peak_flops.of_gpu(torch.cuda.get_device_name(device), dtype)

    def external_profiler(self) -> AbstractContextManager[Any] | None:
        """Between cudaProfilerStart and cudaProfilerStop, as `nsys profile -c cudaProfilerApi` waits for them."""
        profiler: AbstractContextManager[Any] = torch.cuda.profiler.profile()
        return profiler

    def threads_per_rank(self, local_world_size: int) -> int | None:
        """The cores this process may use, divided by the machine's ranks, at least 1; None for a single rank."""
        return share_of_cores(local_world_size)


find_usable_cuda_devices = CUDAAccelerator.find_usable_devices


class _SideStream:
    """Begins to move nests from page-locked memory, on a stream of its own.

    Only what is known to be safe there is moved so: plain tensors of the CPU's. What else a nest holds, such as packed
    sequences, sparse tensors and tensors of a GPU, moves when the nest is wanted, on the stream that wants it.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, nest: Any) -> Callable[[], Any]:
        copies: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu" or type(tensor) is not Tensor or tensor.layout is not torch.strided:
                return tensor
            copies.append(tensor.to(self._device, non_blocking=True))
            return copies[-1]

        with torch.cuda.stream(self._stream):
            begun = apply_to_tensors(nest, copy, on_movable=lambda thing: thing)
            arrived = self._stream.record_event()
        return partial(self._finish, begun, copies, arrived)

    def _finish(self, nest: Any, copies: list[Tensor], arrived: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        for tensor in copies:
            # The allocator gives memory of the side stream to its next copy, unless it knows who else uses it.
            tensor.record_stream(stream)
        return move_to(nest, self._device, non_blocking=True)


@cache
def _side_stream(device: torch.device) -> _SideStream:
    # One for good: memory that was freed is reused only on the stream it was allocated on.
    return _SideStream(device)


def _whole_device(device: torch.device) -> dict[str, float]:
    if torch.version.hip is not None:
        figures = _as_amdsmi_says(device)
    else:
        # By UUID: NVML counts all GPUs of the machine, PyTorch those that CUDA_VISIBLE_DEVICES leaves.
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        figures = {} if uuid is None else nvml.device_figures(str(uuid))
    if "memory_used_bytes" not in figures:
        free, total = torch.cuda.mem_get_info(device)
        figures |= {"memory_used_bytes": float(total - free), "memory_total_bytes": float(total)}
    return figures


def _as_amdsmi_says(device: torch.device) -> dict[str, float]:
    """Figures by AMD's library, through the module `amdsmi` that comes with ROCm; without those that cannot be had."""
    questions: dict[str, Callable[[torch.device], float]] = {
        "utilization_percent": torch.cuda.utilization,
        "temperature_celsius": torch.cuda.temperature,
        "power_watts": torch.cuda.power_draw,  # of NVIDIA it is milliwatts
    }
    figures = {}
    for name, ask in questions.items():
        try:
            figures[name] = float(ask(device))
        except Exception as error:  # amdsmi's own, too, whose class is there only where the module is
            _log.debug("amdsmi does not tell %s: %s", name, error)
    return figures


def _memory_in_use(index: int) -> float:
    try:
        return _whole_device(torch.device("cuda", index))["memory_used_bytes"]
    except RuntimeError:  # held by another process; that is found out again, and said, when it is tried out
        return 0.0


def _is_usable(index: int) -> bool:
    try:
        torch.zeros((), device=torch.device("cuda", index))
    except RuntimeError as error:
        _log.info("GPU %d cannot be used: %s", index, error)
        return False
    return True


def _advise_on_matmul_precision(device: torch.device) -> None:
    if distributed.rank() != 0 or torch.version.hip is not None or torch.cuda.get_device_capability(device) < _AMPERE:
        return
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody chose already, by PyTorch's newer per-backend settings
        return
    if precision == "highest":
        _advise_once(torch.cuda.get_device_name(device))


@cache
def _advise_once(device_name: str) -> None:
    _log.info(
        "%s has TensorFloat-32 cores, which are not used: float32 matrix products are computed at full precision. "
        "torch.set_float32_matmul_precision('high') makes them several times faster, with a mantissa of 10 bits.",
        device_name,
    )
