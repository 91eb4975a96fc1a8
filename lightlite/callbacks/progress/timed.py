"""When to draw, and what; subclasses say how.

It is drawn by the clock. Between two draws a batch costs one look at the clock, and no value is read from the
device.
"""

from __future__ import annotations

import math
import sys
import time
from abc import abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import StepOutput
from lightlite.callbacks.progress.progress_bar import ProgressBar, counts

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

SECONDS_BETWEEN_DRAWS = 0.1
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_EPOCH_LINES = 1.0
_NEVER = math.inf


class TimedProgressBar(ProgressBar):
    """A bar for each of "train", "val", "test" and "predict"; plain lines where bars cannot be drawn.

    Lines come when a stage ends and every 30 seconds in between, and in a fit at most one a second.

    Args:
        refresh_rate: Progress is shown where it is above 0.
        leave: Whether to leave each epoch's bar on the screen.
    """

    _batches_between_draws = 1
    _seconds_between_draws = SECONDS_BETWEEN_DRAWS

    def __init__(self, refresh_rate: int, leave: bool) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._leave = leave
        self._enabled = True
        self._plain = False
        self._bars: dict[str, Any] = {}
        self._next_line = 0.0
        self._fit = Stretch("", ())
        self._evaluation = Stretch("", ())

    @abstractmethod
    def _can_draw(self) -> bool:
        """Whether there is something to draw bars on."""

    @abstractmethod
    def _make(self, stage: str) -> Any:
        """Make a stage's bar, and show it empty; None where it cannot be drawn now."""

    @abstractmethod
    def _draw(self, bar: Any, stretch: Stretch, metrics: dict[str, str]) -> None:
        """Draw how far a stretch is."""

    @abstractmethod
    def _remove(self, bar: Any) -> None:
        """Take a bar away, or leave it for good where it is to stay."""

    def _announce(self, bar: Any, stretch: Stretch) -> None:
        """A stretch begins which a bar that is there is going to show."""

    @property
    def refresh_rate(self) -> int:
        """As it was given."""
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        """Whether progress is shown."""
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether nothing is shown."""
        return not self.is_enabled

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._close()

    def enable(self) -> None:
        """Show progress again, from the next epoch or stage on."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the bar would be drawn."""
        super().setup(trainer, pl_module, stage)
        self._plain = not self._can_draw()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the screen in order."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the screen in order."""
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the fit."""
        self._fit = Stretch("", ())
        self._next_line = 0.0
        self._show_train_bar()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        before = self._fit
        self._line_of_epoch(trainer, pl_module)
        if self._leave and "train" in self._bars and before.done:
            self._draw_fit(trainer, pl_module)
            self._close("train")
        self._show_train_bar()
        self._fit = Stretch(self.train_description, (self.total_train_batches,))
        self._fit.due = min(before.due, self._later())
        if "train" in self._bars:
            self._announce(self._bars["train"], self._fit)

    def _show_train_bar(self) -> None:
        if self.is_enabled and not self._plain and "train" not in self._bars:
            self._bars["train"] = self._make("train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if it is time."""
        self._fit.done = batch_idx + 1
        if time.monotonic() >= self._fit.due and (batch_idx + 1) % self._batches_between_draws == 0:
            self._draw_fit(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole epoch, if it is time."""
        self._fit.end()
        if not self._plain and time.monotonic() >= self._fit.due:
            self._draw_fit(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the end of the fit."""
        self._next_line = 0.0
        self._line_of_epoch(trainer, pl_module)
        if "train" in self._bars:
            self._draw_fit(trainer, pl_module)
        self._close("train")

    def _line_of_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a terminal, a line about the epoch before, now that all of its values are there."""
        if self._plain and self.is_enabled and self._fit.done and time.monotonic() >= self._next_line:
            self._draw_fit(trainer, pl_module)

    def _draw_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: self._shown(value) for name, value in self.get_metrics(trainer, pl_module).items()}
        if self._plain:
            self._write_line(self._fit, metrics)
        elif "train" in self._bars:
            self._draw(self._bars["train"], self._fit, metrics)
        self._fit.due = self._later()

    def _shown(self, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
        return str(value)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the sanity check's bar."""
        self._begin(self.sanity_check_description, trainer.num_sanity_val_batches)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the sanity check's bar away."""
        self._close("val")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation."""
        if not trainer.sanity_checking:
            self._begin(self.validation_description, trainer.num_val_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw, if it is time."""
        self._tick("val", batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation: its time is not the training epoch's."""
        if trainer.state.fn != "fit":
            self._finish("val")
        elif not trainer.sanity_checking:
            self._close("val")
            self._fit.pause(self._evaluation.seconds)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a test."""
        self._begin(self.test_description, trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw, if it is time."""
        self._tick("test", batch_idx, dataloader_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a test."""
        self._finish("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a prediction."""
        self._begin(self.predict_description, trainer.num_predict_batches)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw, if it is time."""
        self._tick("predict", batch_idx, dataloader_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a prediction."""
        self._finish("predict")

    def _begin(self, description: str, batches: Any) -> None:
        self._evaluation = Stretch(description, counts(batches))
        self._evaluation.due = self._later()

    def _tick(self, stage: str, batch_idx: int, dataloader_idx: int) -> None:
        self._evaluation.done = batch_idx + 1
        self._evaluation.loader = dataloader_idx
        if time.monotonic() >= self._evaluation.due and (batch_idx + 1) % self._batches_between_draws == 0:
            self._draw_evaluation(stage)

    def _draw_evaluation(self, stage: str) -> None:
        if self._plain:
            self._write_line(self._evaluation, {})
        else:
            if self._bars.get(stage) is None:
                self._bars[stage] = self._make(stage)
            if self._bars[stage] is not None:
                self._draw(self._bars[stage], self._evaluation, {})
        self._evaluation.due = self._later()

    def _finish(self, stage: str) -> None:
        self._evaluation.end()
        if self.is_enabled:
            self._evaluation.complete()
            self._draw_evaluation(stage)
        self._close(stage)

    def _later(self) -> float:
        """When to draw next, after a draw now."""
        pause = SECONDS_BETWEEN_LINES if self._plain else self._seconds_between_draws
        return time.monotonic() + pause if self.is_enabled else _NEVER

    def _write_line(self, stretch: Stretch, metrics: dict[str, str]) -> None:
        values = "".join(f", {name}={value}" for name, value in metrics.items())
        sys.stdout.write(f"{stretch.line()}{values}\n")
        sys.stdout.flush()
        self._next_line = time.monotonic() + SECONDS_BETWEEN_EPOCH_LINES

    def _close(self, *stages: str) -> None:
        """Close these stages' bars, or all of them."""
        if not stages:
            self._fit.due = self._evaluation.due = _NEVER
        for stage in stages or tuple(self._bars):
            bar = self._bars.pop(stage, None)
            if bar is not None:
                self._remove(bar)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bars": {}}


class Stretch:
    """A run of batches, such as an epoch or a validation.

    Attributes:
        description: What it is called.
        totals: Batches of each loader; infinite where nobody knows.
        done: Batches of the present loader that are over.
        loader: The present loader.
        due: When to draw it, by `time.monotonic()`.
        bar: The bar that shows it, once it has been drawn.
        began: When it began, by `time.time()`, time spent on other things left out.
    """

    def __init__(self, description: str, totals: Sequence[int | float]) -> None:
        self.description = description
        self.totals = totals
        self.done = 0
        self.loader = 0
        self.due = _NEVER
        self.bar: Any = None
        self.began = time.time()
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """How long it took, or takes up to now."""
        return (self._ended or time.time()) - self.began

    @property
    def total(self) -> int | None:
        """Batches of all loaders; None where nobody knows."""
        total = sum(self.totals)
        return int(total) if total and math.isfinite(total) else None

    @property
    def batches(self) -> int:
        """Batches of all loaders that are over."""
        before = sum(self.totals[: self.loader])
        return self.done + (int(before) if math.isfinite(before) else 0)

    @property
    def rate(self) -> float:
        """Batches in a second."""
        return self.batches / max(self.seconds, 1e-9)

    def end(self) -> None:
        """It takes no more time."""
        self._ended = time.time()

    def complete(self) -> None:
        """Count the batches that other ranks had at the end as well."""
        if self.done and self.total is not None:
            self.loader, self.done = 0, self.total

    def pause(self, seconds: float) -> None:
        """Leave so many seconds out of the time it takes."""
        self.began += seconds

    def line(self) -> str:
        """It in words, as "Epoch 0/9: 40/100, 0:00:12, 3.33it/s"."""
        of_total = f"/{self.total}" if self.total is not None else ""
        seconds = timedelta(seconds=round(self.seconds))
        return f"{self.description}: {self.batches}{of_total}, {seconds}, {self.rate:.2f}it/s"
