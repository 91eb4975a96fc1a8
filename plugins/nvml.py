"""What NVIDIA's management library says of a GPU.

Through the module `pynvml`, which the distribution `nvidia-ml-py` installs. A library that is absent, broken or does
not let this user ask is no reason to stop a training: a figure that cannot be had is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch


def device_figures(uuid: str) -> dict[str, float]:
    """Figures of the whole GPU, other processes' share included; empty where NVML tells nothing.

    Args:
        uuid: As in `torch.cuda.get_device_properties(…).uuid`, with or without the prefix "GPU-".
    """
    handle = _handle(uuid)
    if handle is None:
        return {}
    import pynvml

    questions: dict[str, Callable[[], float]] = {
        "utilization_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "memory_total_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    figures = {}
    for name, ask in questions.items():
        try:
            figures[name] = float(ask())
        except pynvml.NVMLError:
            continue
    return figures


class Standing(NamedTuple):
    """How a GPU stands with this process.

    Attributes:
        memory_used_bytes: By all processes.
        is_held: Whether another process has it for itself, or nobody may compute on it.
    """

    memory_used_bytes: float
    is_held: bool


def standing(index: int) -> Standing | None:
    """How a GPU stands, without initialising CUDA; None where NVML does not tell that for sure.

    Args:
        index: PyTorch's, which knows what CUDA_VISIBLE_DEVICES leaves.
    """
    if not _starts():
        return None
    import pynvml

    try:
        if not _orders_agree():
            return None
        handle = torch.cuda._get_pynvml_handler(index)
        if _is_divided(handle):  # PyTorch's index is that of a part
            return None
        mode = pynvml.nvmlDeviceGetComputeMode(handle)
        exclusive = mode in (pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD, pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)
        users = pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if exclusive else []
        held = mode == pynvml.NVML_COMPUTEMODE_PROHIBITED or any(user.pid != os.getpid() for user in users)
        return Standing(float(pynvml.nvmlDeviceGetMemoryInfo(handle).used), held)
    except (pynvml.NVMLError, RuntimeError):  # torch's own, for a part of a divided GPU among others
        return None


def _is_divided(handle: Any) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except pynvml.NVMLError:  # it cannot be divided
        return False


def _orders_agree() -> bool:
    """Whether CUDA counts GPUs in NVML's order, that of the bus: it does for equal ones, and where it is told to."""
    import pynvml

    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return True
    count = pynvml.nvmlDeviceGetCount()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    return len({pynvml.nvmlDeviceGetName(handle) for handle in handles}) == 1


@cache
def _starts() -> bool:
    """Whether the library is there and works."""
    try:
        import pynvml
    except ImportError:
        return False
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return False
    return True


@cache
def _handle(uuid: str) -> Any | None:
    if not _starts():
        return None
    import pynvml

    # Parts of a GPU that is divided (MIG) have names of their own.
    for name in [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError:
            continue
    return None
