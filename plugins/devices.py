"""What the accelerators share: reading `devices=` arguments, and dealing out the CPU's cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import psutil
import torch

from lightlite.errors import MisconfigurationException

ALL = -1
"""The count that means every device there is."""

NODES = Path("/sys/devices/system/node")
"""Where Linux tells which cores belong to which NUMA node, that is, are near which part of the memory."""

BINDING = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Environment variables by which users bind threads to cores themselves."""


def read_devices(devices: int | str | Sequence[int]) -> int | list[int]:
    """A `devices=` argument as a count, `ALL`, or a list of distinct indices; says nothing about what exists.

    Args:
        devices: 2 or "2" (a count), -1, "-1" or "auto" (`ALL`), [0, 3], "0,3" or "3," (indices).

    Raises:
        MisconfigurationException: For anything else.
    """
    given = devices
    if isinstance(devices, str):
        devices = _read_string(devices)
    if isinstance(devices, int) and not isinstance(devices, bool):
        if devices == 0 or devices < ALL:
            raise MisconfigurationException(f"devices={given!r} asks for no device; {_ALLOWED}")
        return devices
    if isinstance(devices, (str, bytes, int)) or not isinstance(devices, Sequence):
        raise MisconfigurationException(f"devices={given!r} is not understood; {_ALLOWED}")
    indices: list[int] = list(cast(Sequence[int], devices))
    if not indices:
        raise MisconfigurationException(f"devices={given!r} asks for no device; {_ALLOWED}")
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in indices):
        raise MisconfigurationException(f"devices={given!r} holds something that is no device index; {_ALLOWED}")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise MisconfigurationException(f"devices={given!r} names device {twice[0]} more than once; name each once")
    return indices


_ALLOWED = 'give a count (2 or "2"), a list of indices ([0, 1] or "0,1"), or "auto" (or -1) for all there are'


def _read_string(text: str) -> int | list[int] | str:
    text = text.strip()
    if text == "auto":
        return ALL
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return int(text)
    except ValueError:
        return text


def affinity_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_nodes(rank: int, sharers: int, folder: Path = NODES) -> set[int] | None:
    """The cores of a rank's share of the NUMA nodes; None where nothing is to be bound.

    So much is bound as leaves all ranks equal: each gets whole nodes of its own, or shares one with as many ranks as
    share any other. Cores that this process may not use, by taskset or a container, do not count. Nothing is bound on a
    machine of one node, for a single rank, where the numbers do not divide, where the nodes have unequal numbers of
    usable cores, or where the user has bound threads by an environment variable.

    Args:
        rank: Which one.
        sharers: Number of ranks on this machine.
        folder: As `NODES`.
    """
    if sharers <= 1 or not hasattr(os, "sched_getaffinity") or any(name in os.environ for name in BINDING):
        return None
    usable = os.sched_getaffinity(0)
    nodes = [cores for cores in (node & usable for node in _nodes(folder)) if cores]
    count = len(nodes)
    uneven = len({len(cores) for cores in nodes}) != 1 or (sharers % count and count % sharers)
    if count < 2 or uneven or set().union(*nodes) != usable:
        return None
    if count >= sharers:
        share = count // sharers
        return set().union(*nodes[rank * share : (rank + 1) * share])
    return nodes[rank * count // sharers]


def _nodes(folder: Path) -> list[set[int]]:
    """The cores of each node, in order; none where that is not told."""
    try:
        lists = {int(path.name[4:]): (path / "cpulist").read_text() for path in folder.glob("node[0-9]*")}
        return [_read_cores(lists[number]) for number in sorted(lists)]
    except (OSError, ValueError):
        return []


def _read_cores(text: str) -> set[int]:
    """The kernel's lists: "0-3,8" is {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; True where that is not known."""
    try:
        has = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # PyTorch is too old to tell
        return True
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def share_of_cores(sharers: int) -> int | None:
    """Threads for each of several processes that share the cores this one may use; None to leave torch's choice.

    What the user chose holds, for every process: by OMP_NUM_THREADS or MKL_NUM_THREADS, or by
    `torch.set_num_threads` with a number that torch would not have taken by itself. A process that shares with
    nobody keeps exactly what a script without a trainer would have: the number of threads can change the rounding.

    The workers of data loaders are not counted. They compute with one thread each, and wait most of the time; cores
    kept free for them would lie idle then, and make the number of threads depend on each loader of a call.

    Args:
        sharers: Number of processes, this one included.
    """
    if sharers <= 1 or any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return None
    cores, present = affinity_cores(), torch.get_num_threads()
    logical, physical = psutil.cpu_count() or 1, psutil.cpu_count(logical=False) or 1
    if present not in (cores, physical, cores * physical // logical):
        return present
    return max(1, cores // sharers)
