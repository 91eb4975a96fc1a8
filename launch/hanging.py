"""Finds the rank for which the others waited in vain, among the processes of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

WAITING = (
    "/torch/distributed/",
    "/torch/autograd/graph.py",
    "lightlite/distributed.py",
    "launch/collect.py",
)
"""Where a rank is that waits for another."""


@dataclass(frozen=True)
class Hanging:
    """A process that others waited for.

    Attributes:
        pid: Its id.
        how: How it was found.
        stack: Where it was, as a traceback shows it; empty if it is stopped, or did not answer.
    """

    pid: int
    how: str
    stack: str


def find(running: Mapping[int, Callable[[], str]]) -> Hanging:
    """The process that hangs.

    Several may be running still, because some of those that wait have not given up yet: one that somebody has stopped
    is taken first, then one that is not inside of a collective call.

    Args:
        running: How to ask each for its stack, by process id.
    """
    found = []
    for pid, ask in running.items():
        if is_stopped(pid):
            return Hanging(pid, "it is stopped (SIGSTOP)", "")
        stack = ask()
        found.append(Hanging(pid, "it was here" if stack else "it does not say where it is", stack))
    return min(found, key=lambda hanging: waits(hanging.stack))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP or by Ctrl-Z."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def waits(stack: str) -> bool:
    """Whether a rank whose stack this is was inside of a collective call, and so waited for others itself."""
    frames = [line for line in stack.splitlines() if line.startswith('  File "')]
    return any(place in frame for frame in frames[-3:] for place in WAITING)
