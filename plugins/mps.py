"""The GPU of Apple silicon, through Metal Performance Shaders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator
from lightlite.nest import move_to
from lightlite.plugins.devices import ALL, read_devices

_log = logging.getLogger(__name__)
_NARROWER = {torch.float64: torch.float32, torch.complex128: torch.complex64}


class MPSAccelerator(Accelerator):
    """The one GPU of a Mac. It has no double precision: float64 goes there as float32, with one note in the log."""

    name = "mps"
    float64 = False

    @staticmethod
    def is_available() -> bool:
        """Whether PyTorch can use the GPU here."""
        return bool(torch.backends.mps.is_available())

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why the GPU cannot be used; None where it can."""
        if cls.is_available():
            return None
        if not torch.backends.mps.is_built():
            return f"this PyTorch ({torch.__version__}) was built without MPS, which exists on macOS only"
        return "MPS needs a Mac with Apple silicon, not a virtual machine, and macOS 14 or newer"

    @staticmethod
    def auto_device_count() -> int:
        """One, or 0 where there is none."""
        return int(MPSAccelerator.is_available())

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """`[0]`, the only device there can be.

        Raises:
            MisconfigurationException: For any other number of devices, or another index.
        """
        wanted = read_devices(devices)
        if wanted not in (ALL, 1, [0]):
            raise MisconfigurationException(
                f"devices={devices!r} was asked of mps, but a Mac has one GPU, which PyTorch offers as the one device "
                'mps:0; use devices=1, or accelerator="cpu" for several processes'
            )
        return [0]

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """`mps:0`."""
        return [torch.device("mps", index) for index in devices]

    def teardown(self) -> None:
        """Give cached memory back to the system."""
        if self.is_available():
            torch.mps.empty_cache()

    def move_module(self, module: nn.Module, device: torch.device) -> None:
        """Move parameters and buffers in place, those in double precision as float32."""
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in _NARROWER:
                tensor.data = _narrow(tensor.data)
        module.to(device)

    def batch_mover(self, device: torch.device) -> Callable[[Any], Any] | None:
        """Copies that wait: on MPS, those that do not have been seen to arrive before their source was written."""
        return partial(move_to, device=device, convert=_narrow)

    def random_state(self, device: torch.device) -> Any:
        """The generator's state, a byte tensor on the CPU."""
        return torch.mps.get_rng_state()

    def set_random_state(self, state: Any, device: torch.device) -> None:
        """Put back what `random_state` returned."""
        torch.mps.set_rng_state(state.cpu())

    def synchronize(self, device: torch.device) -> None:
        """Wait for the GPU."""
        torch.mps.synchronize()

    def advice(self, error: BaseException) -> str:
        """What to do where PyTorch has no version of an operator for this device."""
        if not isinstance(error, NotImplementedError) or "for the MPS device" not in str(error):
            return ""
        if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1":
            return (
                "PYTORCH_ENABLE_MPS_FALLBACK=1 was set after PyTorch had been imported, which reads it then: set it in "
                "the shell, or before the first `import torch`"
            )
        return (
            "PyTorch computes such an operator on the CPU, and copies there and back, if PYTORCH_ENABLE_MPS_FALLBACK=1 "
            "is set before `import torch`: start the script as `PYTORCH_ENABLE_MPS_FALLBACK=1 python …`; or use "
            'accelerator="cpu"'
        )

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """Memory that tensors take, that the driver gave this process, and that it should not exceed."""
        return {
            "process_memory_bytes": float(torch.mps.current_allocated_memory()),
            "process_memory_reserved_bytes": float(torch.mps.driver_allocated_memory()),
            "memory_recommended_bytes": float(torch.mps.recommended_max_memory()),
        }


def _narrow(tensor: Tensor) -> Tensor:
    dtype = _NARROWER.get(tensor.dtype)
    if dtype is None:
        return tensor
    _note_once()
    return tensor.to(dtype)


@cache
def _note_once() -> None:
    _log.warning("MPS has no double precision: float64 tensors go to the device as float32")
