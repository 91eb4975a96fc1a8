"""What each cell of the fault matrix is to end like."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

WAYS = ("script", "command")
RANKS = (0, 1)
STAGES = ("fit", "validate", "predict")
SIGNALS = ("SIGKILL", "SIGSEGV")
STALLS = ("SIGSTOP", "hang", "hang in a collective")
"""Faults that nobody can notice before `Trainer(timeout=…)` has passed."""

FAULTS = (
    "raise",
    "sys.exit",
    "os._exit",
    *SIGNALS,
    *STALLS,
    "loader worker",
    "unpicklable",
    "disk full",
)

ECHO = re.compile(r"closed by (peer|remote)|connection (was )?(reset|refused|closed)|broken pipe", re.IGNORECASE)
"""What ranks say that only noticed that another one is gone."""


@dataclass(frozen=True, order=True)
class Cell:
    """One run.

    Attributes:
        way: "script" for `python train.py` with `Trainer(devices=2)`, "command" for `python -m lightlite.launch`.
        fault: One of FAULTS.
        rank: Who commits it.
        stage: The Trainer's method in which it happens.
    """

    way: str
    fault: str
    rank: int
    stage: str

    def __str__(self) -> str:
        return f"{self.way}, {self.fault}, rank {self.rank}, {self.stage}"

    @property
    def is_callers(self) -> bool:
        """Whether the rank is the process that the user started, with nobody above it who could tell of its end."""
        return self.way == "script" and self.rank == 0

    @property
    def ends_well(self) -> bool:
        """Whether it is no fault at all: only predict sends outputs, and needs room in the temporary folder."""
        return self.fault in ("unpicklable", "disk full") and self.stage != "predict"


def all_cells() -> Iterator[Cell]:
    """The 132 cells, in the table's order."""
    return (Cell(*cell) for cell in itertools.product(WAYS, FAULTS, RANKS, STAGES))


def exit_code(cell: Cell) -> int:
    """The exit code of the process that the user started, as `subprocess` gives it: negative for a signal."""
    if cell.ends_well:
        return 0
    if cell.fault == "sys.exit":
        return 3
    if cell.fault == "os._exit":
        return 7 if cell.way == "command" or cell.is_callers else 1
    if cell.fault in SIGNALS:
        number = getattr(signal, cell.fault)
        return -number if cell.is_callers else 128 + number if cell.way == "command" else 1
    return 1


def words(cell: Cell) -> list[str]:
    """Regular expressions that standard error must match, in this order."""
    rank = cell.rank
    if cell.ends_well:
        return []
    headline = rf"rank {rank} \(host \S+, pid \d+\) "
    failed = [] if cell.is_callers else [rf"{headline}failed"]
    coded = [] if cell.is_callers else [rf"{headline}(failed|exited) with (exit )?code {exit_code_of_rank(cell)}"]
    match cell.fault:
        case "raise":
            return [*failed, "in commit\n", last_line(f"ValueError: boom on rank {rank}")]
        case "sys.exit":
            return coded if cell.way == "command" else []  # Python does not tell of a request to exit
        case "os._exit":
            return coded
        case "SIGKILL" | "SIGSEGV":
            return [] if cell.is_callers else [rf"{headline}was killed by {cell.fault}"]
        case "SIGSTOP":
            return [rf"{headline}kept the other ranks waiting for more than [\d.]+ s; it is stopped \(SIGSTOP\)"]
        case "hang":
            late = rf"{headline}kept the other ranks waiting for more than [\d.]+ s; "
            if cell.is_callers:  # the traceback of its own exception shows where it was
                return ["in hang_here\n", late]
            return [f"{late}it was here:\n", "in hang_here\n"]
        case "hang in a collective":  # all ranks wait then, so that none of them can be blamed
            waited = r"kept the other ranks waiting for|waited for|failed .* the ranks waited for each other"
            return [rf"rank \d \(host \S+, pid \d+\) ({waited})", "in hang_here_in"]
        case "loader worker":
            return [*failed, "Traceback", last_line(f"ValueError: bad sample on rank {rank}")]
        case "unpicklable":
            return [*failed, last_line(rf"lightlite.errors.NotSendableError: .*output \d+ of rank {rank}.*lock.*")]
        case "disk full":
            full = r"OSError: \[Errno (28|27)\] (No space left on device|File too large)"
            return [*failed, last_line(rf"{full}: output \d+ of rank {rank} cannot be kept in .*")]
    raise ValueError(cell.fault)


def exit_code_of_rank(cell: Cell) -> int:
    """The code with which the rank itself ends, where it chooses one."""
    return {"sys.exit": 3, "os._exit": 7}.get(cell.fault, 1)


def last_line(pattern: str) -> str:
    """The last thing printed, with or without the prefix that torch.distributed puts before uncaught exceptions."""
    return rf"(?m)^(\[rank\d+\]: )?{pattern}\n*\Z"
