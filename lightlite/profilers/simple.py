"""How long each action took, and how often it ran."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path

from lightlite.profilers.profiler import Profiler


class SimpleProfiler(Profiler):
    """Reports each action's mean and total duration, in seconds, the longest first.

    An action's time includes that of the actions within it: "run_training_epoch" that of "run_training_batch". Where a
    device works on its own (a GPU), what is measured is the time that the host spent, waiting included. Each call of
    the Trainer has a report of its own; what was recorded before the first one belongs to that.

    Args:
        dirpath: See `Profiler`.
        filename: See `Profiler`.
        extended: Whether to report the number of calls, and the share of the whole time, too.

    Attributes:
        current_actions: When each action that runs now began, by `time.perf_counter()`.
        recorded_durations: The durations of each action.
        start_time: When recording began.

    Raises:
        ValueError: Where an action starts that runs already, or one stops that does not run.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self._begin()

    def _begin(self) -> None:
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: defaultdict[str, list[float]] = defaultdict(list)
        self.start_time = time.perf_counter()
        self._reported = False

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """See `Profiler.setup`."""
        super().setup(stage, local_rank, log_dir)
        if self._reported or not self.recorded_durations:
            self._begin()

    def start(self, action_name: str) -> None:
        """An action begins."""
        if action_name in self.current_actions:
            raise ValueError(
                f"SimpleProfiler.start({action_name!r}): it runs already; stop it first, or give this one another name"
            )
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """An action ends."""
        now = time.perf_counter()
        began = self.current_actions.pop(action_name, None)
        if began is None:
            running = ", ".join(map(repr, self.current_actions)) or "nothing"
            raise ValueError(f"SimpleProfiler.stop({action_name!r}): it was never started; what runs is {running}")
        self.recorded_durations[action_name].append(now - began)

    def summary(self) -> str:
        """The table."""
        whole = time.perf_counter() - self.start_time
        rows = [(action, math.fsum(durations), len(durations)) for action, durations in self.recorded_durations.items()]
        if not rows:
            return ""
        rows.sort(key=lambda row: -row[1])
        columns = {
            "Action": ["Total", *(action for action, _, _ in rows)],
            "Mean duration (s)": ["-", *(f"{total / calls:.6f}" for _, total, calls in rows)],
            "Num calls": [str(sum(calls for _, _, calls in rows)), *(str(calls) for _, _, calls in rows)],
            "Total time (s)": [f"{whole:.4f}", *(f"{total:.4f}" for _, total, _ in rows)],
            "Percentage %": ["100 %", *(f"{100 * total / whole:.2f}" for _, total, _ in rows)],
        }
        if not self.extended:
            del columns["Num calls"], columns["Percentage %"]
            columns = {title: cells[1:] for title, cells in columns.items()}
        return "\n".join([self._title(), *_table(columns, ruled_after_first=self.extended)])

    def describe(self) -> None:
        """See `Profiler.describe`."""
        super().describe()
        self._reported = True


def _table(columns: dict[str, list[str]], ruled_after_first: bool) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, [title, *cells])) for title, cells in columns.items()]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return " | ".join([f"| {first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]) + " |"

    head = line(tuple(columns))
    rule = "-" * len(head)
    body = [line(row) for row in zip(*columns.values(), strict=True)]
    if ruled_after_first:
        body.insert(1, rule)
    return [rule, head, rule, *body, rule]
