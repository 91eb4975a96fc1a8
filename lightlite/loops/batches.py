"""The way of a batch to the device, with the three hooks beside it; nothing where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightlite.hooks import DataHooks, is_overridden

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def batch_preparer(trainer: Trainer, module: LightningModule) -> Callable[[Any, int], Any] | None:
    """A function `(batch, dataloader_idx) -> batch` that brings a batch to the device; None if nothing is to do.

    A hook of the data module goes before the module's.
    """
    owners = [owner for owner in (trainer.datamodule, module) if owner is not None]
    before, transfer, after = (
        next((getattr(owner, name) for owner in owners if is_overridden(name, owner, DataHooks)), None)
        for name in HOOKS
    )
    device = trainer.strategy.root_device
    convert = trainer.precision_plugin.input_converter()
    move = trainer.strategy.accelerator.batch_mover(device)
    action = f"[Strategy]{type(trainer.strategy).__name__}.batch_to_device"
    if transfer is None and move is None and before is None and after is None:
        return None if convert is None else trainer.profiler.wrap(action, lambda batch, _: convert(batch))

    def prepare(batch: Any, dataloader_idx: int) -> Any:
        if convert is not None:
            batch = convert(batch)
        if before is not None:
            batch = before(batch, dataloader_idx)
        if transfer is not None:
            batch = transfer(batch, device, dataloader_idx)
        elif move is not None:
            batch = move(batch)
        return batch if after is None else after(batch, dataloader_idx)

    return trainer.profiler.wrap(action, prepare)
