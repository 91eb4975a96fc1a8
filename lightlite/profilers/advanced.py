"""Which functions the time of each action went to."""

from __future__ import annotations

import io
import marshal
import os
from pathlib import Path
from typing import Any

from lightlite.errors import MisconfigurationException
from lightlite.profilers.profiler import Profiler
from lightlite.utilities import files


class AdvancedProfiler(Profiler):
    """Reports, for each action, the functions called within it, by Python's cProfile, which slows them down much.

    While an action runs within another one, what happens counts for the inner one only.

    Args:
        dirpath: See `Profiler`.
        filename: See `Profiler`.
        line_count_restriction: How many functions to report for each action: a number (int), or a share of them from
            0.0 to 1.0 (float).
        dump_stats: Whether to write each action's raw figures, for `pstats` and its viewers, to
            `<dirpath>/<stage>-<filename>-<action>.prof`, too.

    Attributes:
        profiled_actions: The `cProfile.Profile` of each action, until the report.

    Raises:
        MisconfigurationException: For another `line_count_restriction`; for `dump_stats=True` without a folder.
        ValueError: Where an action stops that was never started.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        limit = line_count_restriction
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not is_number or limit < 0 or (isinstance(limit, float) and limit > 1):
            raise MisconfigurationException(
                f"AdvancedProfiler(line_count_restriction={limit!r}): give a number of lines, such as 20, or a share "
                "of them from 0.0 to 1.0"
            )
        self.line_count_restriction = limit
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, Any] = {}
        self._running: list[str] = []

    def start(self, action_name: str) -> None:
        """An action begins; the one around it is not recorded until it ends."""
        import cProfile

        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        self._running.append(action_name)
        self.profiled_actions.setdefault(action_name, cProfile.Profile()).enable()

    def stop(self, action_name: str) -> None:
        """An action ends; the one around it goes on."""
        if action_name not in self._running:
            running = ", ".join(map(repr, self._running)) or "nothing"
            raise ValueError(f"AdvancedProfiler.stop({action_name!r}): it was never started; what runs is {running}")
        self.profiled_actions[self._running[-1]].disable()
        last = len(self._running) - 1 - self._running[::-1].index(action_name)
        del self._running[last]
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        """A table of functions for each action, those that took longest first."""
        import pstats

        sections = {}
        for action, profile in self.profiled_actions.items():
            if self.dump_stats:
                self._dump(action, profile)
            text = io.StringIO()
            pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative").print_stats(
                self.line_count_restriction
            )
            sections[action] = text.getvalue()
        return self._titled(sections) if sections else ""

    def _dump(self, action: str, profile: Any) -> None:
        if not self.dirpath:
            raise MisconfigurationException(
                "AdvancedProfiler(dump_stats=True) has no folder to write to; give it a dirpath"
            )
        files.make_folder(self.dirpath)
        profile.create_stats()
        with files.open_file(os.path.join(self.dirpath, self._file_name(".prof", action)), "wb") as file:
            marshal.dump(profile.stats, file)

    def teardown(self, stage: str | None) -> None:
        """See `Profiler.teardown`."""
        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        self._running = []
        self.profiled_actions = {}
        super().teardown(stage)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "profiled_actions": {}, "_running": []}
