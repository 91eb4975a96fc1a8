"""Finds the rank for which the others waited in vain, among the processes of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightlite.launch import stacks

WAITING = ("/torch/distributed/", "/torch/autograd/graph.py")
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


def find(running: Mapping[int, Path], beneath: str) -> Hanging:
    """The process that hangs.

    Several may be running still, because some of those that wait have not given up yet: one that somebody has stopped
    is taken first, then one that is not inside of a collective call.

    Args:
        running: File to which each answers where it is (see `stacks.answer`), by process id.
        beneath: Frames up to the last one of this file are left out.
    """
    found = []
    for pid, file in running.items():
        if _is_stopped(pid):
            return Hanging(pid, "it is stopped (SIGSTOP)", "")
        stack = _ask(pid, file, beneath)
        found.append(Hanging(pid, "it was here" if stack else "it does not say where it is", stack))
    return min(found, key=lambda hanging: waits(hanging.stack))


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _ask(pid: int, file: Path, beneath: str) -> str:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return stacks.ask(pid, descriptor, seconds=0.5, beneath=beneath)
    finally:
        os.close(descriptor)


def waits(stack: str) -> bool:
    """Whether a rank whose stack this is was inside of a collective call, and so waited for others itself."""
    frames = [line for line in stack.splitlines() if line.startswith('  File "')]
    return bool(frames) and any(place in frames[-1] for place in WAITING)
