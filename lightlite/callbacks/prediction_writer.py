"""Writes predictions as they come, or when they are all there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException
from lightlite.utilities.enums import LightningEnum

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer


class WriteInterval(LightningEnum):
    """When a BasePredictionWriter writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """Whether it writes at each batch."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether it writes at the end of the epoch."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Base class for a callback that writes what `predict_step` returns.

    Override `write_on_batch_end`, `write_on_epoch_end`, or both. Every rank writes the batches that it predicted;
    `batch_indices` say which samples of the dataset those are.

    Args:
        write_interval: When to write: at each "batch", at the end of the "epoch", or "batch_and_epoch".

    Raises:
        MisconfigurationException: For another interval.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            raise MisconfigurationException(
                f"{type(self).__name__}(write_interval={write_interval!r}): give 'batch', 'epoch' or 'batch_and_epoch'"
            )
        self.interval = WriteInterval(write_interval)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch.

        Args:
            trainer: The trainer.
            pl_module: The module.
            prediction: What `predict_step` returned.
            batch_indices: Which samples of the dataset the batch holds; None for an iterable dataset.
            batch: The batch.
            batch_idx: Its index among all batches of its loader, those of other ranks included.
            dataloader_idx: Its loader's index.
        """
        raise NotImplementedError(f"{type(self).__name__} writes per batch, and lacks write_on_batch_end")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all batches of this rank.

        Args:
            trainer: The trainer.
            pl_module: The module.
            predictions: What `predict_step` returned, by batch; by loader and batch where there are several loaders.
            batch_indices: Which samples of the dataset each batch holds, by loader and batch, even where there is one
                loader; None for a batch of an iterable dataset.
        """
        raise NotImplementedError(f"{type(self).__name__} writes per epoch, and lacks write_on_epoch_end")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch, with interval "batch" or "batch_and_epoch"."""
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all, with interval "epoch" or "batch_and_epoch"."""
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)
