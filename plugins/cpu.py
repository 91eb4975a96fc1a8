"""The CPU: its "devices" are processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from lightlite.interfaces import Accelerator
from lightlite.plugins.devices import ALL, NODES, read_devices, share_of_cores, share_of_nodes


class CPUAccelerator(Accelerator):
    """Processes that compute on the CPU; `devices=N` means N of them, `devices="auto"` means one."""

    name = "cpu"
    numa_nodes: ClassVar[Path] = NODES

    @staticmethod
    def is_available() -> bool:
        """Always True."""
        return True

    @staticmethod
    def auto_device_count() -> int:
        """One: a process computes with as many threads as there are cores already."""
        return 1

    @staticmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """`list(range(n))` for n processes.

        Args:
            devices: The number of processes; -1 or "auto" for one; a list, whose length is the number, so that
                arguments written for another accelerator run here too.

        Raises:
            MisconfigurationException: For zero processes, or where the argument makes no sense.
        """
        wanted = read_devices(devices)
        if isinstance(wanted, list):
            return list(range(len(wanted)))
        return list(range(CPUAccelerator.auto_device_count() if wanted == ALL else wanted))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """The same CPU for every process."""
        return [torch.device("cpu")] * len(devices)

    def batch_mover(self, device: torch.device) -> Callable[[Any], Any] | None:
        """None: batches are here already."""
        return None

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """Figures of the machine and, with the prefix "process_", of this process.

        Utilisation is since the call before (0 at the first); the process's may exceed 100, with several threads.
        """
        process, memory, swap = _process(os.getpid()), psutil.virtual_memory(), psutil.swap_memory()
        return {
            "utilization_percent": float(psutil.cpu_percent()),
            "memory_used_bytes": float(memory.used),
            "memory_available_bytes": float(memory.available),
            "memory_percent": float(memory.percent),
            "swap_used_bytes": float(swap.used),
            "swap_percent": float(swap.percent),
            "process_utilization_percent": float(process.cpu_percent()),
            "process_memory_bytes": float(process.memory_info().rss),
        }

    def threads_per_rank(self, local_world_size: int) -> int | None:
        """The cores this process may use, divided by the machine's ranks, unless the user chose; see `devices.py`."""
        return share_of_cores(local_world_size)

    def cores_of_rank(self, local_rank: int, local_world_size: int) -> set[int] | None:
        """The cores of one NUMA node, or of several, where that leaves all ranks equal; see `devices.py`."""
        return share_of_nodes(local_rank, local_world_size, self.numa_nodes)


@cache
def _process(pid: int) -> psutil.Process:
    # One object for good: it remembers the times from which the next utilisation is counted.
    return psutil.Process(pid)
