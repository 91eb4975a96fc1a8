"""Measures how long a run takes, and stops a fit in time."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import Callback, StepOutput
from lightlite.errors import MisconfigurationException
from lightlite.progress import RunningStage
from lightlite.utilities.enums import LightningEnum
from lightlite.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

_LOOK_EVERY = 1.0
"""Seconds: the ranks agree on the time left no more often than this, except towards its end."""


class Interval(LightningEnum):
    """How often a Timer looks."""

    step = "step"
    epoch = "epoch"


class Timer(Callback):
    """Measures each stage's time, and stops the fit when its time is over.

    The time of a fit that was interrupted and resumed counts together.

    Args:
        duration: How long training may take: a timedelta, its arguments as a dictionary, or "DD:HH:MM:SS". None
            only measures.
        interval: Whether to look after each "step" or each "epoch".
        verbose: Whether to say that the time is over.

    Raises:
        MisconfigurationException: For a duration or interval of another form.
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = Interval.step,
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise MisconfigurationException(f"Timer(interval={interval!r}): interval is 'step' or 'epoch'")
        self._duration = None if duration is None else _parse(duration).total_seconds()
        self._interval = str(interval)
        self._verbose = verbose
        self._started: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._offset = 0.0
        self._batches_to_go = 0

    def start_time(self, stage: str = "train") -> float | None:
        """When a stage ("train", "validate", "test", …) began last, by `time.monotonic()`; None where it never did."""
        return self._started.get(RunningStage(stage).value)

    def end_time(self, stage: str = "train") -> float | None:
        """When a stage ended last, by `time.monotonic()`; None where it never did."""
        return self._ended.get(RunningStage(stage).value)

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that a stage has taken, up to now where it is running."""
        start, end = self.start_time(stage), self.end_time(stage)
        offset = self._offset if RunningStage(stage) is RunningStage.TRAINING else 0.0
        if start is None:
            return offset
        return (time.monotonic() if end is None or end < start else end) - start + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left of the duration; None without one."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether a resumed fit has any time left."""
        if self._duration is not None:
            self._look(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._started["train"] = time.monotonic()
        self._batches_to_go = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._ended["train"] = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._started["validate"] = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._ended["validate"] = time.monotonic()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._started["test"] = time.monotonic()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._ended["test"] = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Look, with interval "step"."""
        if self._duration is None or self._interval != "step":
            return
        self._batches_to_go -= 1
        if self._batches_to_go <= 0:
            self._look(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, with interval "epoch"."""
        if self._duration is not None and self._interval == "epoch":
            self._look(trainer)

    def _look(self, trainer: Trainer, batches: int = 0) -> None:
        """Rank zero decides for all whether the time is over, and after how many batches to look again."""
        assert self._duration is not None
        elapsed = self.time_elapsed()
        wait = 1
        if batches and trainer.world_size > 1:
            # Looking is a collective call there: not at every batch, and more often as the end comes near.
            batches_per_second = max(1, trainer.global_step) / max(elapsed, 1e-6)
            wait = max(1, int(batches_per_second * min(_LOOK_EVERY, (self._duration - elapsed) / 4)))
        over, self._batches_to_go = trainer.strategy.broadcast((elapsed >= self._duration, wait))
        if over:
            trainer.should_stop = True
            if self._verbose:
                rank_zero_info(f"The time limit is reached: {timedelta(seconds=int(elapsed))}. The fit stops.")

    def state_dict(self) -> dict[str, Any]:
        """The seconds that each stage has taken."""
        return {"time_elapsed": {stage.value: self.time_elapsed(stage.value) for stage in RunningStage}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the training time of the fit before."""
        self._offset = state_dict.get("time_elapsed", {}).get("train", 0.0)


def _parse(duration: str | timedelta | dict[str, int]) -> timedelta:
    if isinstance(duration, timedelta):
        return duration
    if isinstance(duration, dict):
        return timedelta(**duration)
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip()) if isinstance(duration, str) else None
    if match is None:
        raise MisconfigurationException(
            f"Timer(duration={duration!r}): give 'DD:HH:MM:SS' as in '00:12:00:00', a timedelta, or its arguments as "
            "in {'hours': 12}"
        )
    days, hours, minutes, seconds = (int(part) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
