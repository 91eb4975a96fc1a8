"""Watches the helpers during one run. The first rank to fail decides, and ends the run for all."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

from lightlite import distributed
from lightlite.errors import RankFailedError
from lightlite.launch import messages
from lightlite.launch.blame import OtherRankFailed, is_consequence, starts_as_consequence
from lightlite.launch.crew import Crew, Helper
from lightlite.launch.messages import Report

T = TypeVar("T")

GRACE = 0.5
"""Seconds that helpers get between SIGTERM and SIGKILL."""

PATIENCE = 1.0
"""Seconds to look for the cause of a failure that looks like the consequence of another."""

NOTICE = 1.0
"""Seconds that rank 0 gets to notice, in a collective, that the others are gone. After that it is told."""

LONG_NOTICE = 20.0
"""The same, where rank 0 may be the one who failed first."""


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
        self._settled = threading.Event()
        self._returned = threading.Event()
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        self._told = False
        self._caller = threading.current_thread()
        self._listener = threading.Thread(target=self._listen, name="lightlite-watch", daemon=True)

    def run(self, call: Callable[[], T]) -> T:
        """Call rank 0's part here, then wait for the helpers.

        Raises:
            BaseException: Rank 0's own, or that of the first helper to fail. The helpers are gone by then.
        """
        self._listener.start()
        failure: Report | None
        try:
            with self._may_be_told():
                result = call()
            self._settled.wait()
            failure = self._failure
        except BaseException as error:
            failure = self._cause_of(error)
            self._abandon()
            if failure is None:
                raise
        if failure is None:
            self._crew.busy = False
            return result
        self._abandon()
        raise_failure(failure)

    def _abandon(self) -> None:
        self._abandoned.set()
        self._listener.join()
        self._crew.end(GRACE)
        distributed.leave()

    def _cause_of(self, error: BaseException) -> Report | None:
        """The helper's failure of which rank 0's exception is the consequence; None if it is rank 0's own."""
        if not is_consequence(error):
            return None
        self._settled.wait(PATIENCE + GRACE + NOTICE)
        if self._failure is not None and self._failure.consequence and not starts_as_consequence(error):
            return None  # the helper's failure is the echo of what rank 0 was dealing with when it lost the others
        return self._failure

    # In the listening thread.

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._waiting:
                selector.register(connection, selectors.EVENT_READ)
            while self._waiting and self._failure is None and not self._abandoned.is_set():
                for key, _ in selector.select(timeout=0.1):
                    self._hear(self._waiting[key.fileobj])  # type: ignore[index]
                    selector.unregister(key.fileobj)
                for helper in list(self._waiting.values()):
                    if helper.process.poll() is not None and not _readable(helper.connection):
                        selector.unregister(helper.connection)
                        self._hear(helper)
                self._decide()
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
            self._suspects.append(report)

    def _decide(self) -> None:
        """Blame the first to fail; one that may only have seen another fail is blamed if no other comes forward."""
        if not self._suspects:
            return
        certain = [report for report in self._suspects if not report.consequence]
        first = min(certain or self._suspects, key=lambda report: report.when)
        if certain or not self._waiting or time.monotonic() - first.when > PATIENCE:
            self._failure = first

    # Telling a rank 0 that does not notice.

    def _tell_caller(self) -> None:
        assert self._failure is not None
        # A helper that merely lost rank 0 must not disturb it, for it may be busy with a failure of its own.
        if self._returned.wait(LONG_NOTICE if self._failure.consequence else NOTICE / 2):
            return
        self._close_store()
        if self._returned.wait(NOTICE / 2):
            return
        with self._lock:
            if self._returned.is_set():
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
        previous = signal.signal(signal.SIGURG, self._on_urgent) if in_main else None
        try:
            yield
        finally:
            with self._lock:
                self._returned.set()
                if self._told and not in_main:
                    _raise_in(self._caller, None)
            if in_main and previous is not None:
                signal.signal(signal.SIGURG, previous)

    def _on_urgent(self, number: int, frame: FrameType | None) -> None:
        if self._told and not self._returned.is_set():
            raise OtherRankFailed


def _readable(connection: socket.socket) -> bool:
    if connection.fileno() < 0:
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def _raise_in(thread: threading.Thread, exception: type[BaseException] | None) -> None:
    assert thread.ident is not None
    argument = ctypes.py_object(exception) if exception is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), argument)


def _obituary(helper: Helper) -> Report:
    """What to say of a helper that went without a word."""
    exitcode: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        exitcode = helper.process.wait(1)
    return Report(helper.rank, helper.process.pid, socket.gethostname(), time.monotonic(), "", exitcode=exitcode)


def describe(failure: Report) -> RankFailedError:
    """The failure of a helper as an exception that ends with what the helper would have printed."""
    code = failure.exitcode
    if code is None:
        how = "failed" if failure.traceback else "closed its connection"
    elif code < 0:
        how = f"was killed by {_signal_name(-code)}"
    else:
        how = f"exited with code {code}"
    headline = f"rank {failure.rank} (host {failure.host}, pid {failure.pid}) {how}"
    message = f"{headline}:\n{failure.traceback}" if failure.traceback else headline
    return RankFailedError(message, failure.rank, code, failure.traceback or "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def raise_failure(failure: Report) -> NoReturn:
    """Raise what the helper raised, with its own traceback as the cause; a RankFailedError where there is nothing."""
    cause = describe(failure)
    original: Any = None
    if failure.exception is not None:
        with contextlib.suppress(Exception):  # whatever a user's exception does while it is rebuilt
            original = pickle.loads(failure.exception)
    if not isinstance(original, Exception):
        raise cause
    raise original from cause
