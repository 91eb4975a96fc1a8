"""What ends a run from outside: signals to the launcher, and the guard that acts where the launcher no longer can."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

GUARD = Path(__file__).with_name("guard.py")
MARK = "LIGHTLITE_RUN_"
"""Beginning of the environment variables by which a run's processes are known."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Guard:
    """The process that ends the ranks if this one is killed.

    Attributes:
        variables: What is to be in the ranks' environment.
        mark: The same as an entry of it, by which this run's processes are known.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # In the name, not the value: what a rank launches in its turn has marks of its own besides.
        name = f"{MARK}{uuid.uuid4().hex}"
        self.variables = {name: "1"}
        self.mark = f"{name}=1"

    def watch(self, *entries: int | str) -> None:
        """If this process dies, kill these process groups, kill whoever has this mark, remove this folder."""
        self._tell("+", entries)

    def forget(self, *entries: int | str) -> None:
        """These have ended, or may live on."""
        self._tell("-", entries)

    def _tell(self, sign: str, entries: Iterable[int | str]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody ended the guard; the run need not end with it
            self._process.stdin.write("".join(f"{sign}{entry}\n" for entry in entries).encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End the guard, and with it whatever it still watches."""
        self.disown()
        self._process.wait()

    def disown(self) -> None:
        """In a forked child: the guard is the parent's."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


@contextlib.contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """Signals that end a process raise elastic's `SignalException`, so that it cleans up behind itself.

    Yields:
        To be called when the cleaning begins: from then on they do nothing.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    def strike(number: int, _: FrameType | None) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    with _handling(strike):
        yield lambda: _handle(lambda number, frame: None)


@contextlib.contextmanager
def passed_on(number: int, send: Callable[[int], None]) -> Iterator[None]:
    """Within it a signal is not for this process, but for the ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(number, lambda number, _: send(number))
    try:
        yield
    finally:
        signal.signal(number, former)


@contextlib.contextmanager
def second_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. Signals that come twice, as `timeout` sends them, change nothing meanwhile."""
    hurry = threading.Event()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            hurry.set()

    with _handling(note):
        yield hurry


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _handle(handler)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, previous in before.items():
                signal.signal(number, previous)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)
