"""What NVIDIA's management library says of a GPU.

Through the module `pynvml`, which the distribution `nvidia-ml-py` installs. A library that is absent, broken or does
not let this user ask is no reason to stop a training: a figure that cannot be had is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


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


@cache
def _handle(uuid: str) -> Any | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return None
    # Parts of a GPU that is divided (MIG) have names of their own.
    for name in [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError:
            continue
    return None
