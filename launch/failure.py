"""Which rank failed first, and how that is told."""

from __future__ import annotations

import json
import re
import signal
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from lightlite.launch import echoes, stacks

TAIL_LINES = 30
CRASH_LINES = 200
CRASH = "Fatal Python error:"

_OF_TORCH = re.compile(r"RuntimeError\b|Dist\w*Error\b|OtherRankFailed\b")
"""Types of the exceptions by which torch tells that another rank is missing."""


@dataclass(frozen=True)
class Failure:
    """One rank's failure.

    Attributes:
        rank: Global rank.
        pid: Of the rank.
        exitcode: As `subprocess` gives it: negative for a signal.
        time: When it happened, in seconds since the epoch.
        origin: Type and text of the exception that began it, or an empty string.
        traceback: The script's own traceback, or an empty string.
        stderr: File that holds what the rank wrote to its standard error; None if that went to the terminal.
        how: What to say of it instead of the exit code.
        remark: What to say besides.
    """

    rank: int
    pid: int
    exitcode: int
    time: float
    origin: str = ""
    traceback: str = ""
    stderr: Path | None = None
    how: str = ""
    remark: str = ""

    @property
    def status(self) -> int:
        """Exit code as a shell gives it: 128 + the signal's number for a signal."""
        return self.exitcode if self.exitcode >= 0 else 128 - self.exitcode

    @property
    def is_consequence(self) -> bool:
        """Whether the rank seems to have failed only because it lost another, or waited for it in vain."""
        if self.origin:
            return _OF_TORCH.match(self.origin) is not None and echoes.is_echo(self.origin)
        return self.exitcode == -signal.SIGABRT  # NCCL's watchdog ends ranks that way

    @property
    def timeout(self) -> str:
        """The text that tells that the rank waited in vain for another; empty if it did not fail by that."""
        text = self.origin if self.is_consequence else ""
        text = text or (self.last_words() if self.exitcode == -signal.SIGABRT else "")
        return text if echoes.is_timeout(text) else ""

    @property
    def name(self) -> str:
        """The rank, for people."""
        return f"rank {self.rank} (host {socket.gethostname()}, pid {self.pid})"

    def describe(self, note: str = "") -> str:
        """The text that the user sees: one line on who failed, then the rank's own last words.

        Args:
            note: Goes to the end of the first line.
        """
        words = (self.traceback or ("" if self.how else self.last_words())).rstrip()
        return f"{self.name} {self.how or self._exit()}{self.remark}{note}" + (f":\n{words}\n" if words else "\n")

    def _exit(self) -> str:
        if self.exitcode >= 0:
            return f"failed with exit code {self.status}"
        try:
            name = signal.Signals(-self.exitcode).name
        except ValueError:
            name = "a signal without a name"
        return f"was killed by {name} (signal {-self.exitcode}), exit code {self.status}"

    def last_words(self) -> str:
        """The end of what the rank wrote to its standard error, and all of Python's account of a crash."""
        if self.stderr is None or not self.stderr.is_file():
            return ""
        lines = self.stderr.read_text(encoding="utf-8", errors="replace").splitlines()[-CRASH_LINES:]
        crash = next((index for index, line in enumerate(lines) if line.startswith(CRASH)), len(lines))
        return "".join(f"{line}\n" for line in lines[min(crash, max(0, len(lines) - TAIL_LINES)) :])


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
        # What comes after a rank's last word is the end of its interpreter, which may fail once more, or a signal.
        exitcode=int(details["exitcode"]) if final or exitcode is None else exitcode,
        time=float(details.get("time", seen)),
        origin=str(details.get("origin", message.get("message", ""))),
        traceback=str(details.get("py_callstack", "")),
        stderr=stderr,
    )


def first_cause(failures: list[Failure]) -> Failure:
    """The failure that brought the others about: the earliest, not counting ranks that only lost a neighbour."""
    causes = [failure for failure in failures if not failure.is_consequence]
    return min(causes or failures, key=lambda failure: (failure.time, failure.rank))


def deadlock(failures: list[Failure]) -> Failure | None:
    """The failure of ranks that waited for one another, with the place of each; None where that is not what failed."""
    first, *others = sorted(failures, key=lambda failure: (not failure.timeout, failure.rank))
    if not first.timeout or not all(failure.is_consequence for failure in failures):
        return None
    how = f"waited{echoes.how_long(first.timeout)} for ranks that did not come; it was here"
    places = stacks.side_by_side(first.traceback, {other.name: other.traceback for other in others})
    return replace(first, how=how, traceback=places)


def memory_kills() -> int | None:
    """How many processes the kernel has killed so far because memory ran out; None where it does not say."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines())
        return int(counters["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
