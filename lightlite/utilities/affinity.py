"""Which of the machine's cores this process runs on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


def cores() -> set[int]:
    """Cores that this thread may run on; one, where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}


def keep_to(wanted: set[int]) -> Callable[[], None]:
    """Have this thread keep to some cores, and with it all threads of the process that may run where it may.

    What it starts from now on, threads and processes, does so too.

    Returns:
        What undoes it.
    """
    before = cores()
    _rebind(before, wanted)
    return lambda: _rebind(wanted, before)


def _rebind(found: set[int], wanted: set[int]) -> None:
    for thread in _threads():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.sched_getaffinity(thread) == found:
                os.sched_setaffinity(thread, wanted)


def _threads() -> Iterator[int]:
    return map(int, os.listdir("/proc/self/task"))
