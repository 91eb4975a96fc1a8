"""What a rank draws from a sampler or a stream that every rank runs alike, and which of it is its own."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightlite import distributed
from lightlite.positions import Placed, WorkerPasses
from lightlite.utilities.combined_loader import draw_together
from lightlite.utilities.seed import capture_rng, restore_rng

FEW = 16
"""Indices by which ranks compare what their samplers draw."""

BLOCK = 4096
"""Indices drawn from a sampler at a time, where the random state has to be borrowed for it."""


class Dealt(Sampler[Any]):
    """What one rank draws from a sampler, which every rank runs alike.

    Args:
        source: The sampler, or batch sampler, of the user's loader.
        deal: Turns the source's items into this rank's; it is also given the first items of the order, if they were
            passed over.
        length: Items this rank gets, or None where the source does not know its own number.
        share: Items of the source for one of this rank's.
        ahead: Whether ranks draw alike, whatever random numbers each uses meanwhile: ahead, in blocks.
        workers: Where the loader's workers have their random numbers from; None where it has no workers.

    Attributes:
        skip: Items of this rank to pass over at the beginning of the next pass.
        limit: Items to draw from the source in the next pass; None for all.
        kept: Where items are noted as they are drawn, for whoever wants to know a batch's indices; None for nowhere.
    """

    def __init__(
        self,
        source: Iterable[Any],
        deal: Callable[[Iterator[Any], list[Any]], Iterator[Any]],
        length: int | None,
        share: int,
        ahead: bool,
        workers: WorkerPasses | None,
    ) -> None:
        self.source, self.workers = source, workers
        self._deal, self._length, self._share, self._ahead = deal, length, share, ahead
        self.skip = 0
        self.limit: int | None = None
        self.kept: deque[Any] | None = None
        self._last: Draw | None = None

    def __iter__(self) -> Iterator[Any]:
        items = iter(self.source)
        seed = None
        if self.workers is not None:
            seed = self.workers.seed()
            items = enumerate(items)
        items = itertools.islice(items, self.limit)
        self._last = Draw(items, BLOCK, self._ahead, self.skip * self._share, max(FEW, self._share))
        dealt = self._deal(self._last, self._last.head)
        if seed is not None:
            dealt = self._placed(dealt, seed)
        return dealt if seed is not None or self.kept is None else self._keep(dealt, self.kept)

    @staticmethod
    def _keep(dealt: Iterator[Any], kept: deque[Any]) -> Iterator[Any]:
        for item in dealt:
            kept.append(item)
            yield item

    def _placed(self, dealt: Iterator[Any], seed: int) -> Iterator[Any]:
        for item in dealt:
            if isinstance(item, list):
                place, indices = [place for place, _ in item], [index for _, index in item]
            else:
                place, indices = item
            if self.kept is not None:
                self.kept.append(indices)
            yield Placed(indices, seed, place)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self.source).__name__} has no length")
        return self._length

    def first_drawn(self) -> list[int] | None:
        """The first indices drawn in this pass, as numbers; None where they are something else."""
        drawn = [] if self._last is None else (self._last.head or self._last.drawn)[:FEW]
        if self.workers is not None:
            drawn = [item for _, item in drawn]
        items = itertools.chain.from_iterable(item if isinstance(item, (list, tuple)) else (item,) for item in drawn)
        try:
            return [operator.index(item) for item in itertools.islice(items, FEW)]
        except TypeError:
            return None

    def draw(self) -> None:
        """Draw the order's beginning now, so that it is drawn from the random state of this moment."""
        if self._last is not None:
            self._last.draw()


class Cycle:
    """The samplers of loaders that start over until the longest is over, drawn from together as one process would.

    Drawn from one after the other, in blocks, they would use the random state in another order.

    Args:
        loaders: The loaders. One that is not dealt out by index only takes its place in the order.

    Attributes:
        columns: For each loader, the batches of indices of the pass that `begin` began.
    """

    def __init__(self, loaders: Sequence[Any]) -> None:
        self._loaders = loaders
        self.columns = [Column(self, index) for index in range(len(loaders))]
        self.iterators: list[Iterator[Any]] = []

    def begin(self, limit: int | None) -> None:
        """Begin a pass, of `limit` batches of each loader."""
        sources = [self._source(loader) for loader in self._loaders]

        def restart(index: int) -> Iterator[Any]:
            loader = self._loaders[index]
            own = getattr(loader, "generator", None)
            if isinstance(loader, DataLoader) and (own is None or not isinstance(sources[index], range)):
                # So does a DataLoader that is iterated anew, to seed its workers.
                torch.empty((), dtype=torch.int64).random_(generator=own)
            return iter(sources[index])

        rows = draw_together("max_size_cycle", [iter(source) for source in sources], restart)
        copies = itertools.tee(Draw(itertools.islice(rows, limit)), len(sources))
        self.iterators = [map(operator.itemgetter(index), copy) for index, copy in enumerate(copies)]

    @staticmethod
    def _source(loader: Any) -> Iterable[Any]:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return range(len(loader))
        return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


class Column(Iterable[Any]):
    """What one loader draws of a `Cycle`."""

    def __init__(self, cycle: Cycle, index: int) -> None:
        self._cycle, self._index = cycle, index

    def __iter__(self) -> Iterator[Any]:
        return self._cycle.iterators[self._index]


class Draw:
    """Draws from a sampler or a stream in blocks, each from the random state in which the one before it ended.

    So what is drawn late does not depend on the random numbers that the model has used meanwhile, which differ from
    rank to rank. Where it has used none, rank zero's random state at the end is the one that one process would have.

    Args:
        items: What to draw from.
        block: Items to draw at a time.
        ahead: Whether to do so; otherwise only a place is sought, and each item is drawn when it is asked for.
        skip: Items to pass over, in one go with the first that is drawn.
        keep: How many of those to keep as `head`.

    Attributes:
        head: The first items of those passed over.
        drawn: The block at hand.
    """

    def __init__(
        self, items: Iterator[Any], block: int = BLOCK, ahead: bool = True, skip: int = 0, keep: int = 0
    ) -> None:
        self._items, self._block, self._ahead = items, block if ahead else 1, ahead
        self._skip, self._keep = skip, keep
        self.head: list[Any] = []
        self.drawn: list[Any] = []
        self._next = 0
        self._begun = False
        self._state: Any = None
        self._first: Any = None
        self._over = False

    def draw(self) -> None:
        """Have the next block at hand."""
        if self._over or self._next < len(self.drawn) or (self._begun and not self._ahead):
            return
        self._pass_over()
        own = None if self._state is None else capture_rng()
        if own is not None:
            restore_rng(self._state)
        self.drawn, self._next, self._begun = list(itertools.islice(self._items, self._block)), 0, True
        if not self._ahead:
            return
        self._over = len(self.drawn) < self._block
        if own is not None and self._over and distributed.rank() == 0 and same_rng(own, self._first):
            return
        self._state = None if self._over else capture_rng()
        if own is None:
            self._first = self._state
        else:
            restore_rng(own)

    def _pass_over(self) -> None:
        self.head += itertools.islice(self._items, min(self._skip, self._keep))
        rest = self._skip - len(self.head)
        self._skip = 0
        if rest > 0:
            next(itertools.islice(self._items, rest - 1, rest), None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._next >= len(self.drawn):
            if self._begun and not self._ahead:
                return next(self._items)
            self.draw()
            if self._next >= len(self.drawn):
                raise StopIteration
        self._next += 1
        return self.drawn[self._next - 1]


def slices(
    items: Iterator[Any], head: list[Any], batch_size: int | None, drop_last: bool, rank: int, world: int
) -> Iterator[Any]:
    """This rank's slice of each global batch of `world * batch_size` items.

    The last, incomplete global batch is completed from the start of the order to a multiple of `world`, or dropped.

    Args:
        items: Sample indices, or whole batches of them.
        head: The start of the order, where that was passed over.
        batch_size: Items of a rank's batch; None where an item is a batch.
        drop_last: Whether to drop an incomplete global batch.
        rank: Which slice.
        world: Number of ranks.
    """
    size = (batch_size or 1) * world
    start: list[Any] = []
    while block := list(itertools.islice(items, size)):
        start = start or (head or block)[:world]
        if len(block) < size:
            if drop_last:
                return
            block += itertools.islice(itertools.cycle(start), -len(block) % world)
        share = len(block) // world
        yield block[rank] if batch_size is None else block[rank * share : (rank + 1) * share]


def same_rng(one: Any, other: Any) -> bool:
    """Whether two random states, as from `capture_rng`, are equal."""
    if one is None or other is None or one.keys() != other.keys():
        return False
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )
