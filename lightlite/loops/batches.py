"""The way of a batch to the device, with the three hooks beside it; nothing where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from lightlite.data import RankLoader, RankLoaders
from lightlite.hooks import DataHooks, is_overridden

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

T = TypeVar("T")
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
NO_BATCH = object()


class BatchPath:
    """What is done with a batch between the loader and the step. A hook of the data module goes before the module's.

    Where the device can move a batch while it computes, the moving begins as soon as the batch is fetched; and batches
    that workers load are fetched one ahead. What is fetched in this process is not: it would draw its random numbers
    before the step at hand has drawn its own. Nor is a batch whose transfer is the user's own.

    Args:
        trainer: For its device, precision and hooks.
        module: The user's module.

    Attributes:
        begin: Begins to move a batch; None where that is done at once, in `prepare`.
        prepare: `(batch, dataloader_idx) -> batch`, when the batch has its turn: of what `begin` returned, if there is
            that. None if nothing is to do.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        owners = [owner for owner in (trainer.datamodule, module) if owner is not None]
        before, transfer, after = (
            next((getattr(owner, name) for owner in owners if is_overridden(name, owner, DataHooks)), None)
            for name in HOOKS
        )
        accelerator, device = trainer.strategy.accelerator, trainer.strategy.root_device
        convert = trainer.precision_plugin.input_converter()
        background = accelerator.background_mover(device) if before is None and transfer is None else None
        self._action = f"[Strategy]{type(trainer.strategy).__name__}.batch_to_device"
        self._wrap = trainer.profiler.wrap
        self.begin: Callable[[Any], Any] | None = None
        self.prepare: Callable[[Any, int], Any] | None
        if background is not None:
            self.begin = self._recorded(_in_turn(convert, background))
            self.prepare = self._recorded(_after_moving(after))
        else:
            move = accelerator.batch_mover(device)
            if transfer is None and move is not None:
                transfer = lambda batch, *_: move(batch)  # noqa: E731
            self.prepare = self._recorded(_in_one_go(convert, before, transfer, after, device))

    def _recorded(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return None if function is None else self._wrap(self._action, function)

    def ahead(self, batches: Iterator[Any], loader: RankLoader | RankLoaders) -> Iterator[Any]:
        """Batches on their way: moving, and fetched one ahead where that changes nothing; as they are otherwise."""
        moving = self.moving(batches)
        return one_ahead(moving) if self.fetches_ahead(loader) else moving

    def moving(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, each of which begins to move as it is fetched."""
        return batches if self.begin is None else map(self.begin, batches)

    def fetches_ahead(self, loader: RankLoader | RankLoaders) -> bool:
        """Whether a batch of the loader is fetched while another one is computed with."""
        return self.begin is not None and loader.may_fetch_ahead


def _in_turn(first: Callable[[Any], Any] | None, second: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return second if first is None else lambda batch: second(first(batch))


def _after_moving(after: Callable[[Any, int], Any] | None) -> Callable[[Callable[[], Any], int], Any]:
    if after is None:
        return lambda moved, _: moved()
    return lambda moved, dataloader_idx: after(moved(), dataloader_idx)


def _in_one_go(
    convert: Callable[[Any], Any] | None,
    before: Callable[[Any, int], Any] | None,
    transfer: Callable[[Any, Any, int], Any] | None,
    after: Callable[[Any, int], Any] | None,
    device: Any,
) -> Callable[[Any, int], Any] | None:
    if before is None and transfer is None and after is None:
        return None if convert is None else lambda batch, _: convert(batch)

    def prepare(batch: Any, dataloader_idx: int) -> Any:
        if convert is not None:
            batch = convert(batch)
        if before is not None:
            batch = before(batch, dataloader_idx)
        if transfer is not None:
            batch = transfer(batch, device, dataloader_idx)
        return batch if after is None else after(batch, dataloader_idx)

    return prepare


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each fetched before the one before it is handed out; an error is raised in its turn."""
    error: Exception | None = None
    item: Any = next(items, NO_BATCH)
    while item is not NO_BATCH:
        following: Any = NO_BATCH
        try:
            following = next(items, NO_BATCH)
        except Exception as raised:
            error = raised
        yield item
        item = following
    if error is not None:
        raise error
