"""The base class of what shows progress."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class ProgressBar(Callback):
    """Base class of what shows progress. The Trainer takes one."""

    _current_eval_dataloader_idx: int | None = None

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
        epoch = self.trainer.current_epoch
        return f"Epoch {epoch}" + (f"/{max(last - 1, epoch)}" if last is not None and last > 0 else "")

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
        """Batches of an epoch, or until the last step where that alone ends the fit; infinite where nobody knows."""
        trainer = self.trainer
        total: int | float = trainer.num_training_batches
        if trainer.max_epochs == -1 and trainer.max_steps > 0:
            return min(total, trainer.max_steps - trainer.global_step)
        return total

    @property
    def total_val_batches(self) -> int | float:
        """Batches of a validation, of all loaders."""
        trainer = self.trainer
        return sum(counts(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches))

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches of the validation loader that `has_dataloader_changed` was last told of."""
        trainer = self.trainer
        return self._of_current(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the test loader that `has_dataloader_changed` was last told of."""
        return self._of_current(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the prediction loader that `has_dataloader_changed` was last told of."""
        return self._of_current(self.trainer.num_predict_batches)

    def _of_current(self, batches: list[int | float]) -> int | float:
        return counts(batches)[self._current_eval_dataloader_idx or 0]

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether this is another loader than at the last call: for a bar of one's own, in `on_…_batch_start`."""
        before, self._current_eval_dataloader_idx = self._current_eval_dataloader_idx, dataloader_idx
        return before != dataloader_idx

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget which loader it was: for a bar of one's own, in `on_…_end`."""
        self._current_eval_dataloader_idx = None

    def disable(self) -> None:
        """Show nothing from now on."""
        raise NotImplementedError(f"{type(self).__name__} lacks disable()")

    def enable(self) -> None:
        """Show progress again."""
        raise NotImplementedError(f"{type(self).__name__} lacks enable()")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing what is shown."""
        (kwargs.get("file") or sys.stdout).write(kwargs.get("sep", " ").join(map(str, args)) + kwargs.get("end", "\n"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take note of the trainer; ranks other than zero show nothing."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float]:
        """What is shown beside the bar: the logger's version, and what was logged with `prog_bar=True`.

        Reading the values makes the host wait for the device; it is done for each draw only.
        """
        return {**get_standard_metrics(trainer), **trainer.progress_bar_metrics}


def get_standard_metrics(trainer: Trainer) -> dict[str, int | str | float]:
    """What is shown without being logged: the first logger's version, of a long one its last four characters."""
    version = trainer.loggers[0].version if trainer.loggers else None
    if version in (None, ""):
        return {}
    return {"v_num": version[-4:] if isinstance(version, str) else version}


def counts(batches: Any) -> list[int | float]:
    """Batches of each loader; infinite where nobody knows."""
    given = batches if isinstance(batches, (list, tuple)) else [batches]
    return [math.inf if count is None else count for count in given]
