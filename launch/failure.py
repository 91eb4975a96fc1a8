"""Which rank failed first, and how that is told."""

from __future__ import annotations

import json
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 30

CONSEQUENCE = re.compile(
    r"^(DistNetworkError|DistStoreError|DistBackendError)\b"
    r"|closed by (peer|remote)|connection (was )?(reset|refused|closed|aborted)|broken pipe|socket closed"
    r"|remote process exited|communicator was aborted|ncclremoteerror|pair closure|failed to (recv|send)"
    r"|(recv|send)(value|bytes)? failed|store .*(closed|not available)",
    re.IGNORECASE,
)
"""What ranks say that only noticed that another one is gone."""


@dataclass(frozen=True)
class Failure:
    """One rank's failure.

    Attributes:
        rank: Global rank.
        pid: Of the rank.
        exitcode: As `subprocess` gives it: negative for a signal.
        time: When it happened, in seconds since the epoch.
        message: The exception's type and text, or an empty string.
        traceback: The script's own traceback, or an empty string.
        stderr: File that holds what the rank wrote to its standard error; None if that went to the terminal.
    """

    rank: int
    pid: int
    exitcode: int
    time: float
    message: str = ""
    traceback: str = ""
    stderr: Path | None = None

    @property
    def status(self) -> int:
        """Exit code as a shell gives it: 128 + the signal's number for a signal."""
        return self.exitcode if self.exitcode >= 0 else 128 - self.exitcode

    @property
    def is_consequence(self) -> bool:
        """Whether the rank seems to have failed only because it lost another."""
        if self.message:
            return CONSEQUENCE.search(self.message) is not None
        return self.exitcode == -signal.SIGABRT  # NCCL's watchdog ends ranks that way

    def describe(self, note: str = "") -> str:
        """The text that the user sees: one line on who failed, then the rank's own last words.

        Args:
            note: Goes to the end of the first line.
        """
        who = f"rank {self.rank} ({socket.gethostname()}, pid {self.pid})"
        if self.exitcode < 0:
            name = signal.Signals(-self.exitcode).name if -self.exitcode in set(signal.Signals) else "unknown"
            what = f"was killed by {name} (signal {-self.exitcode}), exit code {self.status}"
            if self.exitcode == -signal.SIGKILL:
                what += "; the kernel does that when memory runs out"
        else:
            what = f"failed with exit code {self.status}"
        words = self.traceback or self._last_words()
        return f"{who} {what}{note}{':' if words else ''}\n{words}"

    def _last_words(self) -> str:
        if self.stderr is None or not self.stderr.is_file():
            return ""
        lines = self.stderr.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return "".join(f"{line}\n" for line in lines)


def read_failure(
    rank: int, pid: int, exitcode: int | None, seen: float, error_file: str, stderr: Path | None
) -> Failure | None:
    """What is known of a rank that may have failed.

    Args:
        rank: Global rank.
        pid: Of the rank.
        exitcode: None while it runs.
        seen: Time at which it was last seen alive; taken for the time of its failure if it left no word.
        error_file: Where it leaves word, in the format of elastic's `ErrorHandler`.
        stderr: File with its standard error, if any.

    Returns:
        None for a rank that has not failed.
    """
    try:
        message = json.loads(Path(error_file).read_text(encoding="utf-8"))["message"]
        details = message["extraInfo"]
    except (OSError, ValueError, KeyError, TypeError):
        message, details = {}, {}
    final = "time" in details  # written by our entry as the last thing; elastic's `record` may be caught further up
    if exitcode == 0 or (exitcode is None and not final):
        return None
    return Failure(
        rank=rank,
        pid=pid,
        exitcode=int(details.get("exitcode", 1)) if exitcode is None else exitcode,
        time=float(details.get("time", seen)),
        message=str(message.get("message", "")),
        traceback=str(details.get("py_callstack", "")),
        stderr=stderr,
    )


def first_cause(failures: list[Failure]) -> Failure:
    """The failure that brought the others about: the earliest, not counting ranks that only lost a neighbour."""
    causes = [failure for failure in failures if not failure.is_consequence]
    return min(causes or failures, key=lambda failure: (failure.time, failure.rank))
