"""Kinds of hardware: the names people import, served through the registry when first used."""

from __future__ import annotations

from typing import Any

from lightlite.errors import missing_attribute
from lightlite.interfaces import Accelerator
from lightlite.registry import AcceleratorRegistry

__all__ = [
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "find_usable_cuda_devices",
]

CPUAccelerator: Any
CUDAAccelerator: Any
MPSAccelerator: Any
find_usable_cuda_devices: Any

_REGISTERED = {"CPUAccelerator": "cpu", "CUDAAccelerator": "cuda", "MPSAccelerator": "mps"}


def __getattr__(name: str) -> Any:
    if name in _REGISTERED:
        return AcceleratorRegistry.get(_REGISTERED[name])
    if name == "find_usable_cuda_devices":
        return getattr(AcceleratorRegistry.get("cuda"), "find_usable_devices")  # noqa: B009 - not of every Accelerator
    raise missing_attribute(__name__, name)


def __dir__() -> list[str]:
    return __all__
