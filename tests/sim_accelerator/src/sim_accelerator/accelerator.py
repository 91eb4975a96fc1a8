"""What lightlite asks of hardware, answered for the simulated device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration

from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator
from lightlite.nest import move_to
from lightlite.plugins.devices import ALL, read_devices


class SimAccelerator(Accelerator):
    """Simulated devices, one to a process.

    torch learns of them when they are first used, not at import.
    """

    name = "sim"

    @staticmethod
    def is_available() -> bool:
        """Whether this PyTorch lets a device be written in Python."""
        return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Which PyTorch there would have to be; None where it is."""
        if cls.is_available():
            return None
        return f"this PyTorch ({torch.__version__}) does not let a device be written in Python; 2.13 does"

    @staticmethod
    def auto_device_count() -> int:
        """As many as the environment variable SIM_DEVICES says; one by default."""
        return int(os.environ.get("SIM_DEVICES", "1")) if SimAccelerator.is_available() else 0

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Indices of the devices meant: see `Accelerator.parse_devices`."""
        wanted, count = read_devices(devices), SimAccelerator.auto_device_count()
        indices = list(range(count if wanted == ALL else wanted)) if isinstance(wanted, int) else wanted
        if not indices or max(indices) >= count:
            raise MisconfigurationException(
                f"devices={devices!r} was asked of sim, but SIM_DEVICES={count} simulates {count}, with indices from "
                f'0; use at most devices={count}, or "auto"'
            )
        return indices

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """`sim:0` for each: a process sees its own only."""
        _device()
        return [torch.device("sim", 0)] * len(devices)

    def setup_device(self, device: torch.device) -> None:
        """Have backward passes run in this thread: threads of their own are for devices known before the first."""
        torch.autograd.grad_mode.set_multithreading_enabled(False)

    def teardown(self) -> None:
        """Put back what `setup_device` changed."""
        torch.autograd.grad_mode.set_multithreading_enabled(True)

    def move_module(self, module: nn.Module, device: torch.device) -> None:
        """Move parameters and buffers in place.

        Parameters of two devices that torch does not know by heart are not compatible enough for it to keep the
        objects, unless it is asked to swap what is inside them.
        """
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            module.to(device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    def batch_mover(self, device: torch.device) -> Callable[[Any], Any] | None:
        """Copies every tensor of a nest that is elsewhere."""
        return partial(move_to, device=device)

    def random_state(self, device: torch.device) -> Any:
        """The generator's state, a byte tensor on the CPU."""
        return _device().get_rng_state()

    def set_random_state(self, state: Any, device: torch.device) -> None:
        """Put back what `random_state` returned."""
        _device().set_rng_state(state)

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """Memory that this process's tensors on the device take."""
        return {"process_memory_bytes": float(_device().memory_allocated())}

    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """Half precision is as fast as it likes to be on paper."""
        return {torch.float32: 1e12, torch.bfloat16: 2e12, torch.float16: 2e12}.get(dtype)

    def __reduce__(self) -> Any:
        return _received, (type(self), self.__dict__)


def _device() -> Any:
    return import_module("sim_accelerator.device")


def _received(cls: type[SimAccelerator], attributes: dict[str, Any]) -> SimAccelerator:
    # In the process that it is sent to, what comes after it may speak of `sim:0` already.
    _device()
    accelerator = cls()
    accelerator.__dict__.update(attributes)
    return accelerator
