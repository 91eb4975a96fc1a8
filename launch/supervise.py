"""Watches the helpers during one run. The first rank to fail decides, and ends the run for all."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from lightlite import distributed
from lightlite.launch import hanging, messages, reports
from lightlite.launch.blame import OtherRankFailed, is_consequence, starts_as_consequence
from lightlite.launch.crew import Crew, Helper
from lightlite.launch.reports import Report

T = TypeVar("T")

GRACE = 0.5
"""Seconds that helpers get between SIGTERM and SIGKILL."""

PATIENCE = 1.0
"""Seconds to look for the cause of a failure that looks like the consequence of another."""

DECISION = 5.0
"""Seconds that a rank 0 which lost the others waits, at most, for the decision whose failure it was."""

NOTICE = 1.0
"""Seconds that rank 0 gets to notice, in a collective, that the others are gone. After that it is told."""

LONG_NOTICE = 20.0
"""The same, where rank 0 may be the one who failed first."""

REMINDER = 5.0
"""Seconds after which a rank 0 that goes on all the same is told again."""


class Watch:
    """One run of a crew, as seen from rank 0.

    Args:
        crew: The helpers; they have their tasks.
        close_store: Closes the store at which the ranks meet, which frees a rank 0 that waits there.
    """

    def __init__(self, crew: Crew, close_store: Callable[[], None]) -> None:
        self._crew = crew
        self._close_store = close_store
        self._waiting: dict[socket.socket, Helper] = {helper.connection: helper for helper in crew.helpers}
        self._suspects: list[Report] = []
        self._failure: Report | None = None
        self._cause: BaseException | None = None
        self._settled = threading.Event()
        self._aware = threading.Event()
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        self._told = False
        self._signals, self._wakeup = socket.socketpair()
        self._forward_to = -1
        self._interrupted: float | None = None
        self._heeded = -math.inf
        self._caller = threading.current_thread()
        self._listener = threading.Thread(target=self._listen, name="lightlite-watch", daemon=True)

    def run(self, call: Callable[[], T]) -> T:
        """Call rank 0's part here, then wait for the helpers.

        Raises:
            BaseException: Rank 0's own, or that of the first helper to fail. The helpers are gone by then.
        """
        with self._signals, self._wakeup:
            return self._run(call)

    def _run(self, call: Callable[[], T]) -> T:
        self._listener.start()
        try:
            with self._may_be_told():
                result = call()
            self._settled.wait()
        except BaseException as error:
            cause = self.cause_of(error)
            self._abandon()
            if cause is error:
                raise
            raise cause from cause.__cause__
        if self._failure is not None:
            self._abandon()
            failed = reports.as_raised(self._failure)
            raise failed from failed.__cause__
        self._crew.busy = False
        return result

    def _abandon(self) -> None:
        self._abandoned.set()
        try:
            self._listener.join()
        finally:
            self._crew.end(GRACE)
            distributed.leave()

    def cause_of(self, error: BaseException) -> BaseException:
        """What the caller is to learn, where rank 0 raised `error`: that, or another rank's failure behind it.

        Waits for the other ranks' reports, a few seconds at most, where `error` may be the echo of their failure.
        """
        if self._cause is None:
            self._aware.set()
            self._cause = self._find_cause(error)
        return self._cause

    def _find_cause(self, error: BaseException) -> BaseException:
        if not is_consequence(error):
            return error
        with self._lock:
            self._suspects.append(reports.of_error(0, error))
        self._settled.wait(DECISION)
        failure = self._failure
        if failure is None:
            return error
        if failure.echo and (failure.rank == 0 or not starts_as_consequence(error)):
            return error  # the helpers' failures are echoes of what rank 0 was dealing with when it lost the others
        found = reports.as_raised(failure)
        if failure.rank == 0:
            found.__cause__ = error  # whose traceback shows where rank 0 was
        return found

    # In the listening thread.

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._waiting:
                selector.register(connection, selectors.EVENT_READ)
            selector.register(self._signals, selectors.EVENT_READ)
            while (self._waiting or self._suspects) and self._failure is None and not self._abandoned.is_set():
                for key, _ in selector.select(timeout=0.1):
                    if key.fileobj is self._signals:
                        self._note_signals()
                        continue
                    self._hear(self._waiting[key.fileobj])  # type: ignore[index]
                    selector.unregister(key.fileobj)
                for helper in list(self._waiting.values()):
                    if helper.process.poll() is not None and not _readable(helper.connection):
                        selector.unregister(helper.connection)
                        self._hear(helper)
                self._failure = self._first_to_fail()
                if self._is_interrupted_in_vain():
                    self._abandoned.set()
                    self._crew.end(GRACE)
                    self._close_store()
        if self._failure is None:
            self._settled.set()
            return
        self._crew.end(GRACE)
        self._settled.set()
        self._tell_caller()

    def _hear(self, helper: Helper) -> None:
        del self._waiting[helper.connection]
        try:
            report, _ = messages.receive(helper.connection)
        except (EOFError, OSError):
            report = _obituary(helper)
        if report.failed:
            with self._lock:
                self._suspects.append(report)

    def _first_to_fail(self) -> Report | None:
        """Whom to blame, if anybody yet. One that may only have seen another fail is blamed if no other is found."""
        with self._lock:
            suspects = sorted(self._suspects, key=lambda report: report.when)
        certain = [report for report in suspects if not report.echo]
        if certain or not suspects:
            return certain[0] if certain else None
        if any(report.stopped_caller for report in suspects):
            return reports.of_hanging(0, os.getpid(), "it is stopped (SIGSTOP)", suspects)
        everybody_came = not self._waiting and self._aware.is_set()
        if not everybody_came and time.monotonic() - suspects[0].when < PATIENCE:
            return None
        return self._who_hangs(suspects) if any(report.waited for report in suspects) else suspects[0]

    def _who_hangs(self, suspects: list[Report]) -> Report:
        """The rank that the others waited for in vain, or all of them if they waited for one another."""
        running = {helper.process.pid: helper for helper in self._waiting.values()}
        if running:
            found = hanging.find({pid: helper.stack for pid, helper in running.items()})
            where = f"{found.how}:\n{found.stack}" if found.stack else found.how
            return reports.of_hanging(running[found.pid].rank, found.pid, where, suspects)
        if not self._aware.is_set():
            return reports.of_hanging(0, os.getpid(), "its traceback above shows where it was", suspects)
        return reports.of_deadlock(suspects)

    # A Ctrl-C that rank 0 cannot heed, for it waits for the others outside of the interpreter.

    def _note_signals(self) -> None:
        numbers = self._signals.recv(4096)
        if self._forward_to >= 0:
            with contextlib.suppress(OSError):
                os.write(self._forward_to, numbers)
        raises = signal.getsignal(signal.SIGINT) == self._on_interrupt
        if signal.SIGINT in numbers and raises and self._was_heeded():
            self._interrupted = time.monotonic()

    def _was_heeded(self) -> bool:
        # Its handler may have run before this thread came to hear of the signal.
        return self._interrupted is None or self._heeded > self._interrupted - NOTICE

    def _is_interrupted_in_vain(self) -> bool:
        if self._interrupted is None or self._was_heeded() or self._aware.is_set():
            return False
        return time.monotonic() - self._interrupted > NOTICE

    # Telling a rank 0 that does not notice.

    def _tell_caller(self) -> None:
        assert self._failure is not None
        if self._failure.rank == 0:
            first = second = 0.0
        else:
            # A helper that merely lost rank 0 must not disturb it, for it may be busy with a failure of its own.
            first, second = LONG_NOTICE if self._failure.echo else NOTICE / 2, NOTICE / 2
        if self._aware.wait(first):
            return
        self._close_store()
        while not self._aware.wait(second):
            self._interrupt_caller()
            second = REMINDER

    def _interrupt_caller(self) -> None:
        with self._lock:
            if self._aware.is_set():
                return
            self._told = True
            if self._caller is threading.main_thread():
                assert self._caller.ident is not None
                signal.pthread_kill(self._caller.ident, signal.SIGURG)
            else:
                _raise_in(self._caller, OtherRankFailed)

    @contextlib.contextmanager
    def _may_be_told(self) -> Iterator[None]:
        """Let `_tell_caller` interrupt the calling thread; SIGURG, which nobody uses, ends blocking calls as well."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            previous = signal.signal(signal.SIGURG, self._on_urgent)
            interrupt = signal.getsignal(signal.SIGINT)
            if interrupt is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._on_interrupt)
            self._wakeup.setblocking(False)
            self._forward_to = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        try:
            try:
                yield
            finally:
                self._aware.set()  # from here on the handler raises nothing
                with self._lock:
                    if self._told and not in_main:
                        _let_come(self._caller)
        finally:
            if in_main:
                signal.set_wakeup_fd(self._forward_to, warn_on_full_buffer=False)
                signal.signal(signal.SIGURG, previous or signal.SIG_DFL)
                if signal.getsignal(signal.SIGINT) == self._on_interrupt:
                    signal.signal(signal.SIGINT, interrupt)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._heeded = time.monotonic()
        signal.default_int_handler(number, frame)

    def _on_urgent(self, number: int, frame: FrameType | None) -> None:
        if self._told and not self._aware.is_set():
            raise OtherRankFailed


def _readable(connection: socket.socket) -> bool:
    if connection.fileno() < 0:
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def _raise_in(thread: threading.Thread, exception: type[BaseException]) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(exception))


def _let_come(thread: threading.Thread) -> None:
    """Have done with an exception that may be on its way to this thread: it is raised here, at the latest, and over.

    It is not taken back: CPython 3.11 lowers its flag for such exceptions only when it finds one, so that it would look
    for it at every call from then on, and at the first one under a profiler for ever.
    """
    with contextlib.suppress(OtherRankFailed):
        _raise_in(thread, OtherRankFailed)
        for _ in range(10**6):
            pass


def _obituary(helper: Helper) -> Report:
    """What to say of a helper that went without a word."""
    exitcode: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        exitcode = helper.process.wait(1)
    return reports.of_lost(helper.rank, helper.process.pid, exitcode)
