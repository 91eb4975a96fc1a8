"""Where a process is that cannot be asked, for it hangs: its main thread's stack, by way of a signal.

The standard library's faulthandler answers the signal from outside of the interpreter, so even a process that holds
the interpreter's lock for good tells where. It uses the standard library only.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

SIGNAL = signal.SIGURG
"""Nobody uses it, and a process that does not listen ignores it."""

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$', re.MULTILINE)


def answer(file: int) -> None:
    """From now on, write this process's stack to an open file whenever the signal comes."""
    faulthandler.register(SIGNAL, file=file, all_threads=False)


def ask(pid: int, file: int, beneath: str = "", seconds: float = 1.0) -> str:
    """The stack of a process that answers to `file`, as a traceback shows it; empty if there was no answer.

    Args:
        pid: The process.
        file: Its file; the two share its position.
        beneath: As for `readable`.
        seconds: How long to wait for the answer.
    """
    start = os.fstat(file).st_size
    try:
        os.kill(pid, SIGNAL)
    except ProcessLookupError:
        return ""
    deadline = time.monotonic() + seconds
    text = ""
    while time.monotonic() < deadline:
        time.sleep(0.02)
        now = os.pread(file, 2**16, start).decode(errors="replace")
        if now and now == text:
            break
        text = now
    return readable(text, beneath)


def ask_file(pid: int, path: Path, beneath: str) -> str:
    """The same of a process that answers to a file with a name."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return ask(pid, descriptor, beneath, seconds=0.5)
    finally:
        os.close(descriptor)


def frames_of(trace: str) -> str:
    """The frames of a traceback, without the exception's own words and the first line."""
    return "\n".join(line for line in trace.splitlines() if line.startswith("  "))


def side_by_side(trace: str, others: Mapping[str, str]) -> str:
    """Where a rank was, and below it where others were, each under its name; all from their tracebacks."""
    places = [frames_of(trace)] + [f"{name} was here:\n{frames_of(other)}" for name, other in others.items()]
    return "\n".join(places)


def readable(text: str, beneath: str = "") -> str:
    """Faulthandler's account of a stack as a traceback: the innermost call last, with the lines of the source.

    Args:
        text: What faulthandler wrote.
        beneath: Frames up to and including the last one of this file are left out.
    """
    frames = [
        traceback.FrameSummary(found["file"], int(found["line"]), found["name"]) for found in _FRAME.finditer(text)
    ]
    frames.reverse()
    for index in range(len(frames) - 1, -1, -1):
        if beneath and frames[index].filename == beneath:
            frames = frames[index + 1 :]
            break
    return "".join(traceback.format_list(frames)).rstrip()
