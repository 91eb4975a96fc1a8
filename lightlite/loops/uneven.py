"""Training on streams of which some ranks' end earlier: the others' last batches are the last global batches.

A rank without a batch runs nothing of the module, and counts as nothing: the gradient is the mean over the batches that
there are, as of one process that accumulates over them. It takes part in everything else, so that nobody waits for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightlite import distributed
from lightlite.data import ABSENT, RankLoader, RankLoaders

if TYPE_CHECKING:
    from lightlite.loops.step import TrainStep
    from lightlite.trainer import Trainer

Pairs = Iterator[tuple[Any, int]]


class Uneven:
    """How many ranks have a part in a global batch, and what a rank without one does.

    Args:
        count: Makes, of a rank's batches and the number of those passed over, pairs of a batch, or ABSENT, and the
            number of ranks that have one.

    Attributes:
        present: Ranks that have a batch of the global batch at hand.
        absent: Whether this rank has none.
    """

    def __init__(self, count: Callable[[Iterator[Any], int], Pairs]) -> None:
        self._count = count
        self.present, self.absent = distributed.world_size(), False

    def pairs(self, batches: Iterator[Any], skip: int, begin: Callable[[Any], Any] | None) -> Pairs:
        """A rank's batches, or ABSENT, which `begin` begins to move, each with the number of ranks that have one."""
        for batch, present in self._count(batches, skip):
            yield batch if begin is None or batch is ABSENT else begin(batch), present

    def unpack(self, numbered: Iterator[tuple[tuple[Any, int], int]]) -> Iterator[tuple[Any, int]]:
        """Batches, None where this rank has none, and their indices."""
        for (batch, self.present), batch_idx in numbered:
            self.absent = batch is ABSENT
            yield None if self.absent else batch, batch_idx

    def preparer(self, prepare: Callable[[Any, int], Any] | None) -> Callable[[Any, int], Any] | None:
        """What brings a batch to the device, if there is one."""
        if prepare is None:
            return None
        return lambda batch, loader_idx: batch if self.absent else prepare(batch, loader_idx)

    def step(self, step: TrainStep, trains: bool) -> Callable[[Any, int, bool], Any]:
        """What runs the training step, on all ranks or on those that have a batch."""
        world = distributed.world_size()
        whole = step if trains else step.observe

        def run(batch: Any, batch_idx: int, last: bool) -> Any:
            if self.present == world:
                return whole(batch, batch_idx, last)
            return step.without_some(batch, batch_idx, last, self.present, self.absent, trains)

        return run


def uneven(
    trainer: Trainer, loader: RankLoader | RankLoaders, counts: Sequence[int | None], automatic: bool
) -> Uneven | None:
    """What is needed where ranks may have different numbers of batches; None where they have not.

    Args:
        trainer: The trainer.
        loader: What this rank iterates.
        counts: Every rank's number of batches; None where it is not known.
        automatic: Whether the training step, rather than the user's code, computes gradients.
    """
    if len(counts) == 1 or not automatic or not trainer.strategy.joins:
        return None
    if loader.deals_out:
        if not isinstance(loader, RankLoader) or not loader.end_as_they_come():
            return None
        return Uneven(lambda batches, _: ((batch, loader.present) for batch in batches))
    if any(distributed.gather_objects(loader.length is None)):  # whose number of batches may be less than its limit
        return Uneven(_agreed)
    if len(set(counts)) == 1:
        return None
    known = [count for count in counts if count is not None]
    return Uneven(lambda batches, skip: _counted(batches, skip, known))


def _agreed(batches: Iterator[Any], skip: int) -> Pairs:
    while True:
        batch = next(batches, ABSENT)
        present = int(distributed.all_reduce(torch.tensor(int(batch is not ABSENT)), "sum"))
        if not present:
            return
        yield batch, present


def _counted(batches: Iterator[Any], skip: int, counts: list[int]) -> Pairs:
    padded = itertools.chain(batches, itertools.repeat(ABSENT))
    for batch, index in zip(padded, range(skip, max(counts)), strict=False):  # in this order, to use the loader up
        yield batch, sum(count > index for count in counts)
