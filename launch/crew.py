"""The helper processes of one calling process: starting them, giving them work, ending them."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from lightlite.distributed import Ranks
from lightlite.launch import guard, messages, stacks
from lightlite.launch.ending import Guard
from lightlite.launch.messages import Task
from lightlite.launch.transport import Packed, anonymous_file

WORKER = Path(__file__).with_name("worker.py")


class Helper:
    """One helper process, in a session of its own: a Ctrl-C at the terminal does not reach it.

    Args:
        rank: The rank it takes in every run.
        threads: CPU threads to compute with, unless the user's OMP_NUM_THREADS says so; None for torch's choice.
        folder: Where it keeps sockets.
        variables: What is to be in its environment besides.
    """

    def __init__(self, rank: int, threads: int | None, folder: str, variables: dict[str, str]) -> None:
        self.rank = rank
        self.connection, theirs = socket.socketpair()
        environ = {**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONSAFEPATH": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        if threads is not None and "OMP_NUM_THREADS" not in os.environ:
            environ["OMP_NUM_THREADS"] = str(threads)
            environ.setdefault("MKL_NUM_THREADS", str(threads))
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        program = [sys.executable, *flags, "-m", "lightlite.launch.worker"]
        self._stack = anonymous_file()
        kept = (theirs.fileno(), self._stack.fileno())
        command = [*program, str(kept[0]), str(os.getpid()), folder, str(kept[1])]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environ, pass_fds=kept, start_new_session=True
            )

    def stack(self) -> str:
        """Where the helper is at this moment, as a traceback shows it; empty if it does not say."""
        return stacks.ask(self.process.pid, self._stack.fileno(), beneath=str(WORKER))

    def close(self) -> None:
        """Close what connects this process with the helper."""
        self.connection.close()
        self._stack.close()

    def signal_group(self, number: int) -> None:
        """Send a signal to the helper and to everything it has started, whether it lives itself or not."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Crew:
    """The helpers that are ranks 1 … size - 1; rank 0 is the process that makes this.

    Args:
        size: Number of ranks, the calling process included.
        threads: As for `Helper`.
    """

    def __init__(self, size: int, threads: int | None) -> None:
        self.owner = os.getpid()
        self.size = size
        self.busy = False
        self._guard = Guard()
        # Loader workers, here and there, keep sockets in this folder; made here, it is removed however they end.
        self._folder = multiprocessing.util.get_temp_dir()
        self._guard.watch(self._guard.mark)
        if multiprocessing.parent_process() is None:  # else the folder is that process's
            self._guard.watch(self._folder)
        self.helpers = [Helper(rank, threads, self._folder, self._guard.variables) for rank in range(1, size)]
        self._guard.watch(*(helper.process.pid for helper in self.helpers))

    def is_ready(self) -> bool:
        """Whether every helper lives and waits for work."""
        return bool(self.helpers) and not self.busy and all(helper.process.poll() is None for helper in self.helpers)

    def send(self, store: tuple[str, int], work: Packed, file: BinaryIO) -> None:
        """Give every helper its task.

        Args:
            store: Where the ranks meet.
            work: The function and its arguments.
            file: The rest of `work`.
        """
        self.busy = True
        try:
            folder = os.getcwd()
        except FileNotFoundError:
            folder = None
        for helper in self.helpers:
            ranks = Ranks(helper.rank, helper.rank, 0, self.size, self.size, store)
            task = Task(ranks, work, sys.argv, sys.path, folder, dict(os.environ))
            # A helper that has died meanwhile is noticed, and named, by who watches the run.
            with contextlib.suppress(OSError):
                messages.send(helper.connection, task, [file.fileno()])

    def end(self, grace: float = 0.0) -> None:
        """End the helpers and all that they started; return when they are gone.

        Args:
            grace: Seconds between asking (SIGTERM) and killing. Zero kills at once.
        """
        helpers, self.helpers = self.helpers, []
        if not helpers or self.owner != os.getpid():
            return
        try:
            self._ask_to_end(helpers, grace)
        finally:  # whoever cannot wait any longer, and interrupts, gets the end at once
            groups = [helper.process.pid for helper in helpers]
            guard.end(groups, [self._guard.mark])
            for helper in helpers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    helper.process.wait(5)
                helper.close()
            self._guard.forget(self._folder, self._guard.mark, *groups)
            self._guard.close()

    @staticmethod
    def _ask_to_end(helpers: list[Helper], grace: float) -> None:
        if not grace:
            return
        for helper in helpers:
            helper.signal_group(signal.SIGTERM)
        deadline = time.monotonic() + grace
        for helper in helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.process.wait(max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """In a forked child: close the connections, which are the parent's."""
        self._guard.disown()
        for helper in self.helpers:
            helper.close()
