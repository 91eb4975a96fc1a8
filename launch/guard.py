"""Ends what a process has started as ranks if that process itself is killed: `python guard.py`.

A process of its own, in a session of its own, that holds the reading end of a pipe from the launcher. A line "+pid"
names a process group that is to be ended, "+NAME=VALUE" an entry of the environment by which processes are known that
have left the group, "+/path" a folder that is to be removed; "-…" takes it back. When the pipe closes, for whatever
reason, what is left on the list goes.

It uses the standard library only, for it has to start at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable

JANITORS = (b"multiprocessing.resource_tracker", b"torch_shm_manager")
"""Helpers of a process that remove its shared memory once it has ended, and then end themselves."""


def main() -> None:
    """Keep the list until the launcher is gone, then end what is on it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # sent to everybody, they must not end the guard before the launcher
    watched: set[str] = set()
    for line in _lines(os.getppid()):
        (watched.add if line[0] == "+" else watched.discard)(line[1:])
    folders = {entry for entry in watched if entry.startswith("/")}
    groups = {entry for entry in watched if entry.isdigit()}
    end(map(int, groups), watched - folders - groups)
    for folder in folders:
        _remove(folder)


def _lines(parent: int) -> Iterable[str]:
    """Lines from the parent. A child that it forked may hold the pipe open, so its life is watched as well."""
    rest = ""
    while True:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, rest = (rest + data.decode()).split("\n")
            yield from lines
        elif os.getppid() != parent:
            return


def end(groups: Iterable[int], marks: Iterable[str] = (), patience: float = 1.0) -> None:
    """Kill processes, and return when they are gone; where processes cannot be listed, only signal the groups.

    Args:
        groups: Process groups.
        marks: Entries of the environment, "NAME=VALUE". All who have inherited one are killed, too; Linux only.
        patience: Seconds in which those that remove the shared memory of others may finish.
    """
    groups, wanted = set(groups), {mark.encode() for mark in marks}
    if sys.platform != "linux":
        for group in groups:
            _unless_gone(os.killpg, group)
        return
    start = time.monotonic()
    while (left := _members(groups, wanted)) and time.monotonic() < start + patience + 2:
        for pid in left:
            if time.monotonic() > start + patience or not _is_janitor(pid):
                _unless_gone(os.kill, pid)
        time.sleep(0.01)


def _unless_gone(kill: Callable[[int, int], None], target: int) -> None:
    try:
        kill(target, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _members(groups: set[int], marks: set[bytes]) -> list[int]:
    """Processes that live, belong to one of the groups or have one of the marks, and are not this one."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            state, _, group = _read(pid, "stat").rpartition(b")")[2].split()[:3]
            if state in b"ZX" or pid == os.getpid():
                continue
            if int(group) in groups or (marks and not marks.isdisjoint(_read(pid, "environ").split(b"\0"))):
                found.append(pid)
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return found


def _is_janitor(pid: int) -> bool:
    try:
        command = _read(pid, "cmdline")
    except OSError:
        return False
    return any(name in command for name in JANITORS)


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _remove(folder: str) -> None:
    import shutil

    for _ in range(20):  # where processes cannot be listed, one that is dying may still add a file
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.05)


if __name__ == "__main__":
    main()
