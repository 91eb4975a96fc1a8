"""Shows how far a run has come: a bar in a terminal or notebook, a line now and then elsewhere.

It is drawn by the clock. Between two draws a batch costs one look at the clock, and no value is read from the
device.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import Callback, StepOutput
from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

SECONDS_BETWEEN_DRAWS = 0.1
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_EPOCH_LINES = 1.0
_NEVER = math.inf


class ProgressBar(Callback):
    """Base class of what shows progress. The Trainer takes one."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer whose progress this shows.

        Raises:
            MisconfigurationException: Before the first run.
        """
        if self._trainer is None:
            raise MisconfigurationException(f"{type(self).__name__} knows no trainer before a run begins")
        return self._trainer

    @property
    def sanity_check_description(self) -> str:
        """What the sanity check is called."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """What training is called: the epoch, and the last one's number where there is one."""
        last = self.trainer.max_epochs
        return f"Epoch {self.trainer.current_epoch}" + (f"/{last - 1}" if last is not None and last > 0 else "")

    @property
    def validation_description(self) -> str:
        """What validation is called."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What testing is called."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """What predicting is called."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """Batches of an epoch; infinite where nobody knows."""
        total: int | float = self.trainer.num_training_batches
        return total

    @property
    def total_val_batches(self) -> int | float:
        """Batches of a validation, of all loaders."""
        trainer = self.trainer
        return sum(_counts(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches))

    def disable(self) -> None:
        """Show nothing from now on."""
        raise NotImplementedError(f"{type(self).__name__} lacks disable()")

    def enable(self) -> None:
        """Show progress again."""
        raise NotImplementedError(f"{type(self).__name__} lacks enable()")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing what is shown."""
        sys.stdout.write(kwargs.get("sep", " ").join(map(str, args)) + kwargs.get("end", "\n"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take note of the trainer; ranks other than zero show nothing."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float]:
        """What is shown beside the bar: the logger's version, and what was logged with `prog_bar=True`.

        Reading the values makes the host wait for the device; it is done for each draw only.
        """
        metrics: dict[str, int | str | float] = {}
        version = trainer.loggers[0].version if trainer.loggers else None
        if version not in (None, ""):
            metrics["v_num"] = version[-4:] if isinstance(version, str) else version
        return {**metrics, **trainer.progress_bar_metrics}


class TQDMProgressBar(ProgressBar):
    """Bars by tqdm, at most ten draws a second; without a terminal, plain lines.

    Lines come when a stage ends and every 30 seconds in between, and in a fit at most one a second.

    Args:
        refresh_rate: Draw only after a multiple of so many batches; 0 for no bar at all.
        process_position: How many lines further down to draw, for scripts with bars of their own.
        leave: Whether to leave each epoch's bar on the screen.

    Raises:
        MisconfigurationException: For a negative rate or position.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__()
        if refresh_rate < 0 or process_position < 0:
            raise MisconfigurationException(
                f"TQDMProgressBar(refresh_rate={refresh_rate}, process_position={process_position}): give 0 or more"
            )
        self._refresh_rate = refresh_rate
        self._process_position = process_position
        self._leave = leave
        self._enabled = True
        self._plain = False
        self._bars: dict[str, Any] = {}
        self._next_line = 0.0
        self._fit = _Stretch("", ())
        self._evaluation = _Stretch("", ())

    @property
    def refresh_rate(self) -> int:
        """After a multiple of how many batches it may be drawn."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """How many lines further down it is drawn."""
        return self._process_position

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

    @property
    def train_progress_bar(self) -> Any:
        """Tqdm's bar of the fit."""
        return self._bar("train")

    @property
    def val_progress_bar(self) -> Any:
        """Tqdm's bar of the validation or sanity check in progress."""
        return self._bar("val")

    @property
    def test_progress_bar(self) -> Any:
        """Tqdm's bar of the test."""
        return self._bar("test")

    @property
    def predict_progress_bar(self) -> Any:
        """Tqdm's bar of the prediction."""
        return self._bar("predict")

    def _bar(self, stage: str) -> Any:
        if stage not in self._bars:
            raise TypeError(f"there is no {stage} bar: it is made at its first draw, and only where bars can be drawn")
        return self._bars[stage]

    def init_train_tqdm(self) -> Any:
        """Make the bar of the fit; override it to change its looks."""
        return self._make_bar(self.train_description, _finite(self.total_train_batches), leave=True)

    def init_sanity_tqdm(self) -> Any:
        """Make the bar of the sanity check."""
        return self._make_bar(self.sanity_check_description, self._evaluation.total, leave=False)

    def init_validation_tqdm(self) -> Any:
        """Make the bar of a validation: below the fit's, or in its place outside of a fit."""
        below = "train" in self._bars
        return self._make_bar(self.validation_description, self._evaluation.total, leave=not below, position=int(below))

    def init_test_tqdm(self) -> Any:
        """Make the bar of a test."""
        return self._make_bar(self.test_description, self._evaluation.total, leave=True)

    def init_predict_tqdm(self) -> Any:
        """Make the bar of a prediction."""
        return self._make_bar(self.predict_description, self._evaluation.total, leave=True)

    def _make_bar(self, description: str, total: int | None, leave: bool, position: int = 0) -> Any:
        return _tqdm_class()(
            desc=description,
            total=total,
            position=position + self._process_position,
            leave=leave,
            **_size(),
            file=sys.stdout,
            smoothing=0.1,
            mininterval=0,
            miniters=0,
            bar_format=self.BAR_FORMAT,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the bar would be drawn."""
        super().setup(trainer, pl_module, stage)
        self._plain = not _in_notebook() and not sys.stdout.isatty()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the screen in order."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the screen in order."""
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the fit."""
        self._fit = _Stretch("", ())
        self._next_line = 0.0
        self._show_train_bar()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        before = self._fit
        self._line_of_epoch(trainer, pl_module)
        if self._leave and "train" in self._bars and before.done:
            self._draw_fit(trainer, pl_module)
            self._bars.pop("train").close()
        self._show_train_bar()
        self._fit = _Stretch(self.train_description, (self.total_train_batches,))
        self._fit.due = min(before.due, self._later())

    def _show_train_bar(self) -> None:
        if self.is_enabled and not self._plain and "train" not in self._bars:
            self._bars["train"] = self.init_train_tqdm()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if it is time."""
        self._fit.done = batch_idx + 1
        if time.monotonic() >= self._fit.due and (batch_idx + 1) % self._refresh_rate == 0:
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
        metrics = ", ".join(f"{name}={_shown(value)}" for name, value in self.get_metrics(trainer, pl_module).items())
        if self._plain:
            self._write_line(self._fit, metrics)
        elif "train" in self._bars:
            bar = self._bars["train"]
            bar.set_postfix_str(metrics, refresh=False)
            self._fit.draw(bar)
        self._fit.due = self._later()

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
            self._fit.pause(self._evaluation.seconds, self._bars.get("train"))

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
        self._evaluation = _Stretch(description, _counts(batches))
        self._evaluation.due = self._later()

    def _tick(self, stage: str, batch_idx: int, dataloader_idx: int) -> None:
        self._evaluation.done = batch_idx + 1
        self._evaluation.loader = dataloader_idx
        if time.monotonic() >= self._evaluation.due and (batch_idx + 1) % self._refresh_rate == 0:
            self._draw_evaluation(stage)

    def _draw_evaluation(self, stage: str) -> None:
        if self._plain:
            self._write_line(self._evaluation, "")
        else:
            if stage not in self._bars and (self.trainer.state.fn != "fit" or _can_nest()):
                make = {
                    "val": self.init_validation_tqdm,
                    "test": self.init_test_tqdm,
                    "predict": self.init_predict_tqdm,
                }
                self._bars[stage] = self.init_sanity_tqdm() if self.trainer.sanity_checking else make[stage]()
            if stage in self._bars:
                self._evaluation.draw(self._bars[stage])
        self._evaluation.due = self._later()

    def _finish(self, stage: str) -> None:
        self._evaluation.end()
        if self.is_enabled:
            self._evaluation.complete()
            self._draw_evaluation(stage)
        self._close(stage)

    def _later(self) -> float:
        """When to draw next, after a draw now."""
        pause = SECONDS_BETWEEN_LINES if self._plain else SECONDS_BETWEEN_DRAWS
        return time.monotonic() + pause if self.is_enabled else _NEVER

    def _write_line(self, stretch: _Stretch, metrics: str) -> None:
        sys.stdout.write(f"{stretch.line()}{', ' if metrics else ''}{metrics}\n")
        sys.stdout.flush()
        self._next_line = time.monotonic() + SECONDS_BETWEEN_EPOCH_LINES

    def _close(self, *stages: str) -> None:
        """Close these stages' bars, or all of them."""
        if not stages:
            self._fit.due = self._evaluation.due = _NEVER
        for stage in stages or tuple(self._bars):
            bar = self._bars.pop(stage, None)
            if bar is not None:
                bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        bar = next(iter(self._bars.values()), None)
        if bar is None:
            super().print(*args, **kwargs)
            return
        bar.write(kwargs.get("sep", " ").join(map(str, args)), file=kwargs.get("file"), end=kwargs.get("end", "\n"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bars": {}}


class _Stretch:
    """A run of batches, such as an epoch or a validation.

    Attributes:
        description: What it is called.
        totals: Batches of each loader; infinite where nobody knows.
        done: Batches of the present loader that are over.
        loader: The present loader.
        due: When to draw it, by `time.monotonic()`.
    """

    def __init__(self, description: str, totals: Sequence[int | float]) -> None:
        self.description = description
        self.totals = totals
        self.done = 0
        self.loader = 0
        self.due = _NEVER
        self._began = time.time()
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        return (self._ended or time.time()) - self._began

    @property
    def total(self) -> int | None:
        return _finite(sum(self.totals))

    @property
    def batches(self) -> int:
        before = sum(self.totals[: self.loader])
        return self.done + (int(before) if math.isfinite(before) else 0)

    def end(self) -> None:
        self._ended = time.time()

    def complete(self) -> None:
        """Count the batches that other ranks had at the end as well."""
        if self.done and self.total is not None:
            self.loader, self.done = 0, self.total

    def pause(self, seconds: float, bar: Any) -> None:
        """Leave so many seconds out of the time it takes."""
        self._began += seconds
        if bar is not None and bar.desc.startswith(self.description):
            bar.start_t += seconds
            bar.last_print_t += seconds

    def draw(self, bar: Any) -> None:
        """Draw it, as a stretch of its own from when it began."""
        if not bar.desc.startswith(f"{self.description}: ") or bar.n > self.batches:
            bar.set_description(self.description, refresh=False)
            bar.reset(total=self.total)
        if not bar.n:
            bar.start_t = bar.last_print_t = self._began
        bar.update(self.batches - bar.n)

    def line(self) -> str:
        """It in words, as "Epoch 0/9: 40/100, 0:00:12, 3.33it/s"."""
        of_total = f"/{self.total}" if self.total is not None else ""
        rate = self.batches / max(self.seconds, 1e-9)
        return f"{self.description}: {self.batches}{of_total}, {timedelta(seconds=round(self.seconds))}, {rate:.2f}it/s"


def _counts(batches: Any) -> list[int | float]:
    given = batches if isinstance(batches, (list, tuple)) else [batches]
    return [math.inf if count is None else count for count in given]


def _finite(count: int | float) -> int | None:
    return int(count) if count and math.isfinite(count) else None


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
    return str(value)


def _size() -> dict[str, Any]:
    """Let tqdm follow the terminal's size; it draws nothing in one that does not know its size."""
    try:
        known = os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        known = True
    columns, rows = shutil.get_terminal_size()
    return {"dynamic_ncols": True} if known else {"ncols": columns, "nrows": rows}


def _in_notebook() -> bool:
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _can_nest() -> bool:
    """Whether a second bar can be drawn below the first: not as text in a notebook, which has no cursor to move."""
    return not _in_notebook() or find_spec("ipywidgets") is not None


def _tqdm_class() -> Any:
    if _in_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        # tqdm would start a thread and a semaphore shared with other processes, which outlive a killed run.
        monitor_interval = 0
        _lock = threading.RLock()

    return Bar
