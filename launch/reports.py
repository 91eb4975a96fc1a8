"""What is known of a rank that failed, and the exception by which the caller learns of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from lightlite.errors import RankFailedError, RankTimeoutError
from lightlite.launch import blame, echoes, hanging, stacks, transport


@dataclass(frozen=True)
class Report:
    """What became of a rank's task, as it says itself, or as others found it.

    Attributes:
        rank: Who it is about.
        pid: Its process id.
        host: Its machine.
        when: Time of the end, in seconds of a clock that all processes of the machine share.
        traceback: The failure as Python prints it; None for success.
        exception: The exception, pickled, if it can be.
        exitcode: The code, where the failure was an exit or an attempt to.
        echo: Whether this looks like some other rank's failure, as seen from here.
        waited: Whether the echo is that another rank was waited for in vain.
        stopped_caller: Whether that other rank is the calling process, which somebody had stopped.
        hangs: How the rank was found, if it is one that was waited for.
    """

    rank: int
    pid: int
    host: str
    when: float
    traceback: str | None = None
    exception: bytes | None = field(default=None, repr=False)
    exitcode: int | None = None
    echo: bool = False
    waited: bool = False
    stopped_caller: bool = False
    hangs: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the task failed."""
        return self.traceback is not None

    @property
    def name(self) -> str:
        """The rank, for people."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def of_success(rank: int) -> Report:
    """This process did what it was asked to."""
    return Report(rank, os.getpid(), socket.gethostname(), time.monotonic())


def of_error(rank: int, error: BaseException, *, caller: int | None = None) -> Report:
    """This process failed.

    Args:
        rank: Its rank.
        error: What was raised. The outermost frame of its traceback, which is this package's, is left out.
        caller: The process id of rank 0, for others.
    """
    when = time.monotonic()
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
    exitcode = None
    if isinstance(error, SystemExit):
        exitcode = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    pickled = None
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):  # then the traceback has to tell it all
            pickled = transport.pack_small(error)
    waited = blame.is_timeout(error)
    return Report(
        rank,
        os.getpid(),
        socket.gethostname(),
        when,
        "".join(traceback.format_exception(type(error), error, trace)).rstrip(),
        pickled,
        exitcode,
        echo=blame.is_consequence(error) or getattr(error, "on_every_rank", False),
        waited=waited,
        stopped_caller=waited and caller is not None and hanging.is_stopped(caller),
    )


def of_lost(rank: int, pid: int, exitcode: int | None) -> Report:
    """A process that went without a word."""
    return Report(rank, pid, socket.gethostname(), time.monotonic(), "", exitcode=exitcode)


def of_hanging(rank: int, pid: int, where: str, waiting: list[Report]) -> Report:
    """A process that kept the others waiting.

    Args:
        rank: Its rank.
        pid: The process.
        where: A word on where it was found; the rest of it, after a line's end, is the stack.
        waiting: Those who waited.
    """
    how, _, stack = where.partition("\n")
    how = f"kept the other ranks waiting{_how_long(waiting)}; {how}"
    return Report(rank, pid, socket.gethostname(), time.monotonic(), stack, hangs=how)


def of_deadlock(waiting: list[Report]) -> Report:
    """Several processes, each of which waited for another that had gone another way."""
    first, *others = sorted(waiting, key=lambda report: not report.waited)
    how = f"waited{_how_long(waiting)} for ranks that did not come; it was here:"
    places = stacks.side_by_side(first.traceback or "", {other.name: other.traceback or "" for other in others})
    return Report(first.rank, first.pid, first.host, first.when, places, hangs=how)


def _how_long(waiting: list[Report]) -> str:
    return next((echoes.how_long(report.traceback or "") for report in waiting if report.waited), "")


def describe(failure: Report) -> RankFailedError:
    """A failure as an exception that ends with what the rank would have printed."""
    code, text = failure.exitcode, failure.traceback or ""
    if failure.hangs is not None:
        how = failure.hangs
    elif code is None:
        how = "failed:" if text else "closed its connection"
    elif code < 0:
        how = f"was killed by {_signal_name(-code)}" + (
            "; the kernel does that when memory runs out" if -code == signal.SIGKILL else ""
        )
    else:
        how = f"exited with code {code}" + (":" if text else "")
    message = f"{failure.name} {how}" + (f"\n{text}" if text else "")
    kind = RankTimeoutError if failure.hangs is not None else RankFailedError
    return kind(message, failure.rank, code, text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def as_raised(failure: Report) -> BaseException:
    """What a helper raised, with its own traceback as the cause; a RankFailedError where that cannot be had.

    A helper that asked to exit makes the caller exit with its code, which Python does without a word; so the word
    is printed here.
    """
    cause = describe(failure)
    original: Any = None
    if failure.exception is not None:
        with contextlib.suppress(Exception):  # whatever a user's exception does while it is rebuilt
            original = pickle.loads(failure.exception)
    elif failure.exitcode is not None and failure.exitcode > 0 and failure.traceback:
        original = SystemExit(failure.exitcode)
        sys.stderr.write(f"{cause}\n")
    if not isinstance(original, (Exception, SystemExit)):
        return cause
    original.__cause__ = cause
    return original
