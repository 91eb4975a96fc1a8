"""Progress by rich."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightlite.callbacks.progress.timed import SECONDS_BETWEEN_DRAWS, Stretch, TimedProgressBar
from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.trainer import Trainer


@dataclass
class RichProgressBarTheme:
    """Styles of a bar's parts, as rich writes them ("bold green", "#6206E0"); see rich's documentation.

    Attributes:
        description: Of what is shown, as "Epoch 0/9".
        progress_bar: Of the bar.
        progress_bar_finished: Of the bar at its end.
        progress_bar_pulse: Of the bar where nobody knows the number of batches.
        batch_progress: Of the number of batches.
        time: Of the time passed and the time left.
        processing_speed: Of the batches in a second.
        metrics: Of the values.
        metrics_text_delimiter: What stands between two values.
        metrics_format: How a number is written, by Python's rules; those it does not suit are written as they are.
    """

    description: Any = ""
    progress_bar: Any = "#6206E0"
    progress_bar_finished: Any = "#6206E0"
    progress_bar_pulse: Any = "#6206E0"
    batch_progress: Any = ""
    time: Any = "dim"
    processing_speed: Any = "dim underline"
    metrics: Any = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


def require_rich(wanted_by: str) -> None:
    """See that rich is installed.

    Raises:
        ModuleNotFoundError: Saying how to install it.
    """
    if find_spec("rich") is None:
        raise ModuleNotFoundError(f"{wanted_by} draws with the package rich, which is not installed: pip install rich")


class RichProgressBar(TimedProgressBar):
    """Bars by rich, at most ten draws a second; without a terminal, plain lines.

    Args:
        refresh_rate: At most so many draws a second, but never more than ten; 0 for no bar at all.
        leave: Whether to leave each epoch's bar on the screen.
        theme: Styles of its parts.
        console_kwargs: Arguments of `rich.console.Console`, to which rich's own console is changed.

    Attributes:
        progress: The `rich.progress.Progress` that is shown now, or None.

    Raises:
        ModuleNotFoundError: Without rich.
        MisconfigurationException: For a negative rate.
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require_rich("RichProgressBar")
        if refresh_rate < 0:
            raise MisconfigurationException(f"RichProgressBar(refresh_rate={refresh_rate}): give 0 or more")
        super().__init__(refresh_rate, leave)
        if refresh_rate:
            self._seconds_between_draws = max(SECONDS_BETWEEN_DRAWS, 1 / refresh_rate)
        self.theme = RichProgressBarTheme() if theme is None else theme
        self._console_kwargs = console_kwargs or {}
        self.progress: Any = None

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """What stands beside each other in a line; override it for other columns. The values follow at the end.

        A task has the fields "batches", "time" and "speed", as text.
        """
        from rich.progress import BarColumn, TextColumn

        theme = self.theme
        return [
            TextColumn("{task.description}", style=theme.description, markup=False),
            BarColumn(
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            TextColumn("{task.fields[batches]}", style=theme.batch_progress, markup=False),
            TextColumn("{task.fields[time]}", style=theme.time, markup=False),
            TextColumn("{task.fields[speed]}", style=theme.processing_speed, markup=False),
        ]

    @property
    def train_progress_bar(self) -> Any:
        """Rich's task of the fit."""
        return self._task("train")

    @property
    def val_sanity_check_bar(self) -> Any:
        """Rich's task of the sanity check."""
        return self._task("val")

    @property
    def val_progress_bar(self) -> Any:
        """Rich's task of the validation in progress."""
        return self._task("val")

    @property
    def test_progress_bar(self) -> Any:
        """Rich's task of the test."""
        return self._task("test")

    @property
    def predict_progress_bar(self) -> Any:
        """Rich's task of the prediction."""
        return self._task("predict")

    def _task(self, stage: str) -> Any:
        task = self._bars.get(stage)
        if task is None:
            raise TypeError(f"there is no {stage} bar: it is made at its first draw, and only where bars can be drawn")
        return next(known for known in self.progress.tasks if known.id == task)

    def _console(self) -> Any:
        import rich

        return rich.get_console()

    def _can_draw(self) -> bool:
        import rich

        if self._console_kwargs:
            rich.reconfigure(**self._console_kwargs)
        console = self._console()
        return bool(console.is_interactive or console.is_jupyter)

    def _make(self, stage: str) -> Any:
        from rich.progress import Progress, TextColumn

        if self.progress is None:
            theme = self.theme
            self.progress = Progress(
                *self.configure_columns(self.trainer),
                TextColumn("{task.fields[metrics]}", style=theme.metrics, markup=False),
                console=self._console(),
                auto_refresh=False,
            )
            self.progress.start()
        description = self.train_description if stage == "train" else self._evaluation.description
        return self.progress.add_task(description, total=None, batches="", time="", speed="", metrics="")

    def _draw(self, bar: Any, stretch: Stretch, metrics: dict[str, str]) -> None:
        if stretch.bar != bar:
            self.progress.reset(bar, total=stretch.total, description=stretch.description)
            stretch.bar = bar
        left = "-:--:--"
        if stretch.total is not None and stretch.batches:
            left = str(timedelta(seconds=round((stretch.total - stretch.batches) / stretch.rate)))
        self.progress.update(
            bar,
            completed=stretch.batches,
            batches=f"{stretch.batches}/{'--' if stretch.total is None else stretch.total}",
            time=f"{timedelta(seconds=round(stretch.seconds))} • {left}",
            speed=f"{stretch.rate:.2f}it/s",
            metrics=self.theme.metrics_text_delimiter.join(f"{name}: {value}" for name, value in metrics.items()),
        )
        self.progress.refresh()

    def _shown(self, value: Any) -> str:
        try:
            return value if isinstance(value, str) else format(value, self.theme.metrics_format)
        except (TypeError, ValueError):
            return str(value)

    def _remove(self, bar: Any) -> None:
        """Take the bar of a validation within a fit away; leave another one for good, with which the display ends."""
        within_fit = self._bars or self.trainer.sanity_checking
        if within_fit:
            self.progress.remove_task(bar)
            self.progress.refresh()
            return
        progress, self.progress = self.progress, None
        progress.stop()

    def _close(self, *stages: str) -> None:
        super()._close(*stages)
        if not stages and self.progress is not None:
            self.progress.stop()
            self.progress = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, by rich."""
        if self.progress is None or kwargs.get("file") is not None:
            super().print(*args, **kwargs)
        else:
            sep, end = kwargs.get("sep", " "), kwargs.get("end", "\n")
            self.progress.console.print(*args, sep=sep, end=end, markup=False, highlight=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "progress": None}
