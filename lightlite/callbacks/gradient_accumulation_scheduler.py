"""Accumulate gradients over more, or fewer, batches as training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Sets `trainer.accumulate_grad_batches` at the start of each epoch, as a schedule says.

    Args:
        scheduling: Over how many batches to accumulate, by the epoch, counted from 0, from which on to do so. Before
            the first one named, every batch is a step.

    Raises:
        TypeError: For anything but a dict, or an empty one.
        MisconfigurationException: For epochs below 0 and factors below 1.

    Example:
        `GradientAccumulationScheduler({4: 2, 8: 4})` accumulates 2 batches from epoch 4 on, and 4 from epoch 8 on.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        if not isinstance(scheduling, dict) or not scheduling:
            raise TypeError(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}); give a dict of factors by epoch, as in "
                "{0: 1, 4: 2}"
            )
        if any(not _is_count(epoch, 0) or not _is_count(factor, 1) for epoch, factor in scheduling.items()):
            raise MisconfigurationException(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}); the keys are epochs, ints >= 0, and the "
                "values numbers of batches, ints >= 1, as in {0: 1, 4: 2}"
            )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._in_charge = False

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether there is an epoch in which gradients are accumulated."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Over how many batches gradients are accumulated in an epoch."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that nobody else decides on it, and take up an epoch that a checkpoint was taken in."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientAccumulationScheduler has no effect in manual optimization; step the optimizer every so many "
                "batches in training_step instead"
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) beside a "
                "GradientAccumulationScheduler, which sets it for every epoch; leave out one of the two"
            )
        self._in_charge = True
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set what holds from this epoch on."""
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trainer as it was, for a further fit."""
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was, for a further fit."""
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if self._in_charge:
            trainer.accumulate_grad_batches = 1
        self._in_charge = False


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
