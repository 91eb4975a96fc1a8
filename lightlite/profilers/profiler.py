"""What every profiler has in common: named actions that start and stop, and a report."""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightlite.utilities import files
from lightlite.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightlite.module import LightningModule

T = TypeVar("T")


class Profiler(ABC):
    """Records what named actions cost. For a profiler of your own, write `start`, `stop` and `summary` in a subclass.

    The Trainer starts and stops actions named as in Lightning 2.x: "run_training_epoch", "run_training_batch",
    "[Strategy]….training_step", "[Callback]Name.hook", "[LightningModule]Name.hook" and so on; hooks that nobody wrote
    do not run, and are not recorded. Your own code can do the same: `with self.trainer.profiler.profile("name"): …`

    Args:
        dirpath: The folder of the report; by default where the trainer's logger writes.
        filename: The report goes to `<dirpath>/<stage>-<filename>.txt`, with several ranks to one file for each
            (`-<rank>`), after what is there already. None: rank zero's goes to the logger "lightlite", others' nowhere.
    """

    _stage: str | None = None
    _local_rank: int | None = None
    _lightning_module: LightningModule | None = None
    """The module of the call in progress; the trainer sets it."""

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename

    @abstractmethod
    def start(self, action_name: str) -> None:
        """An action begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """An action ends."""

    def summary(self) -> str:
        """The report; empty where there is nothing to say."""
        return ""

    def profile(self, action_name: str) -> AbstractContextManager[str]:
        """Context in which an action is recorded."""
        return self._running_action(action_name)

    @contextmanager
    def _running_action(self, action_name: str) -> Iterator[str]:
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def wrap(self, action_name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, each call of which is recorded as an action."""

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> T:
            self.start(action_name)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop(action_name)

        return recorded

    def profile_iterable(self, iterable: Iterable[T], action_name: str) -> Iterator[T]:
        """What `iterable` yields; fetching each item is recorded as an action."""
        items = iter(iterable)
        while True:
            with self.profile(action_name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def describe(self) -> None:
        """Write the report, or log it, and tear down. The Trainer does so at the end of each call."""
        report = self.summary()
        if report and self.dirpath and self.filename:
            files.make_folder(self.dirpath)
            with files.open_file(os.path.join(self.dirpath, self._file_name(".txt")), "a") as file:
                file.write(report + "\n")
        elif report and not self._local_rank:
            rank_zero_info("\n%s", report)
        self.teardown(self._stage)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A call of the Trainer begins.

        Args:
            stage: "fit", "validate", "test" or "predict".
            local_rank: This process's rank, where there are several; over all machines, so that no two write one file.
            log_dir: Where the trainer's logger writes.
        """
        self._stage, self._local_rank = stage, local_rank
        self.dirpath = self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:
        """The call is over, well or not: let go of what was taken."""
        self._lightning_module = None

    @property
    def local_rank(self) -> int:
        """This process's rank, as given to `setup`; 0 where it is the only one."""
        return self._local_rank or 0

    def _file_name(self, extension: str, action_name: str | None = None) -> str:
        """`<stage>-<filename>-<rank>-<action><extension>`, of those that there are."""
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = [part for part in (self._stage, self.filename, rank, action_name) if part]
        return (re.sub(r"[\\/:*?\"<>|\s_]+", "_", "-".join(parts)) or "profile") + extension

    def _titled(self, sections: dict[str, str]) -> str:
        """A report of one section for each action."""
        rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
        lines = [self._title()]
        for action, text in sections.items():
            lines += [f"Profile stats for: {action}{rank}", text]
        return "\n".join(lines)

    def _title(self) -> str:
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lightning_module": None}
