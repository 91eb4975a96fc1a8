"""Progress by tqdm."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from importlib.util import find_spec
from typing import Any

from lightlite.callbacks.progress.timed import Stretch, TimedProgressBar
from lightlite.errors import MisconfigurationException


class TQDMProgressBar(TimedProgressBar):
    """Bars by tqdm, at most ten draws a second; without a terminal, plain lines.

    Lines come when a stage ends and every 30 seconds in between, and in a fit at most one a second.

    Args:
        refresh_rate: Draw only after a multiple of so many batches; 0 for no bar at all. The environment variable
            TQDM_MINITERS, where it is higher, goes before it.
        process_position: How many lines further down to draw, for scripts with bars of their own.
        leave: Whether to leave each epoch's bar on the screen.

    Raises:
        MisconfigurationException: For a negative rate or position.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        if refresh_rate < 0 or process_position < 0:
            raise MisconfigurationException(
                f"TQDMProgressBar(refresh_rate={refresh_rate}, process_position={process_position}): give 0 or more"
            )
        if refresh_rate:
            refresh_rate = max(refresh_rate, int(os.environ.get("TQDM_MINITERS", 0)))
        super().__init__(refresh_rate, leave)
        self._batches_between_draws = refresh_rate
        self._process_position = process_position

    @property
    def process_position(self) -> int:
        """How many lines further down it is drawn."""
        return self._process_position

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
        """The bar; one that shows nothing where none is drawn, so that code which changes it runs anywhere."""
        if self._trainer is None:
            raise TypeError(f"there is no {stage} bar before a run begins")
        bar = self._bars.get(stage)
        return _tqdm_class()(disable=True) if bar is None else bar

    def init_train_tqdm(self) -> Any:
        """Make the bar of the fit; override it to change its looks."""
        return self._make_bar(self.train_description, Stretch("", (self.total_train_batches,)).total, leave=True)

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

    def _can_draw(self) -> bool:
        return _in_notebook() or sys.stdout.isatty()

    def _make(self, stage: str) -> Any:
        if stage == "train":
            return self.init_train_tqdm()
        if self.trainer.state.fn == "fit" and not _can_nest():
            return None
        if self.trainer.sanity_checking:
            return self.init_sanity_tqdm()
        return {"val": self.init_validation_tqdm, "test": self.init_test_tqdm, "predict": self.init_predict_tqdm}[
            stage
        ]()

    def _announce(self, bar: Any, stretch: Stretch) -> None:
        bar.set_description(stretch.description, refresh=False)

    def _draw(self, bar: Any, stretch: Stretch, metrics: dict[str, str]) -> None:
        if metrics:
            bar.set_postfix_str(", ".join(f"{name}={value}" for name, value in metrics.items()), refresh=False)
        if stretch.bar is not bar or bar.n > stretch.batches:
            bar.reset(total=stretch.total)
            stretch.bar, bar.start_t, bar.last_print_t = bar, stretch.began, stretch.began
        elif bar.start_t != stretch.began:
            # A validation came in between, whose time does not count.
            bar.last_print_t += stretch.began - bar.start_t
            bar.start_t = stretch.began
        bar.update(stretch.batches - bar.n)

    def _remove(self, bar: Any) -> None:
        bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        bar = next((bar for bar in self._bars.values() if bar is not None), None)
        if bar is None:
            super().print(*args, **kwargs)
            return
        bar.write(kwargs.get("sep", " ").join(map(str, args)), file=kwargs.get("file"), end=kwargs.get("end", "\n"))


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
