"""What a rank draws from a sampler or a stream that every rank runs alike, and which of it is its own."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lightlite import distributed
from lightlite.utilities.seed import capture_rng, restore_rng

FEW = 16
"""Indices by which ranks compare what their samplers draw."""

BLOCK = 4096
"""Indices drawn from a sampler at a time, where the random state has to be borrowed for it."""


class Dealt(Sampler[Any]):
    """What one rank draws from a sampler that every rank runs alike.

    Args:
        source: The sampler, or batch sampler, of the user's loader.
        deal: Turns the source's items into this rank's.
        length: Items this rank gets, or None where the source does not know its own number.

    Attributes:
        skip: Items of this rank to pass over at the beginning of the next pass.
        limit: Items to draw from the source in the next pass; None for all.
        kept: Where items are noted as they are drawn, for whoever wants to know a batch's indices; None for nowhere.
    """

    def __init__(
        self, source: Iterable[Any], deal: Callable[[Iterator[Any]], Iterator[Any]], length: int | None
    ) -> None:
        self.source, self._deal, self._length = source, deal, length
        self.skip = 0
        self.limit: int | None = None
        self.kept: deque[Any] | None = None
        self._last: Draw | None = None

    def __iter__(self) -> Iterator[Any]:
        self._last = Draw(itertools.islice(iter(self.source), self.limit))
        dealt = self._deal(self._last)
        if self.skip:
            dealt = itertools.islice(dealt, self.skip, None)
        return dealt if self.kept is None else self._keep(dealt, self.kept)

    @staticmethod
    def _keep(dealt: Iterator[Any], kept: deque[Any]) -> Iterator[Any]:
        for item in dealt:
            kept.append(item)
            yield item

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self.source).__name__} has no length")
        return self._length

    def first_drawn(self) -> list[int] | None:
        """The first indices drawn in this pass, as numbers; None where they are something else."""
        items = itertools.chain.from_iterable(
            item if isinstance(item, (list, tuple)) else (item,) for item in (self._last.drawn if self._last else ())
        )
        try:
            return [operator.index(item) for item in itertools.islice(items, FEW)]
        except TypeError:
            return None

    def draw(self) -> None:
        """Draw the order's beginning now, so that it is drawn from the random state of this moment."""
        if self._last is not None:
            self._last.draw()


class Endless(Iterable[Any]):
    """An iterable that starts over whenever it is over.

    Args:
        source: The iterable.
        generator: For a DataLoader's sampler, the loader's generator, if it has one of its own.
    """

    def __init__(self, source: Any, generator: torch.Generator | None = None) -> None:
        self._source, self._generator = source, generator

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            if number and not isinstance(self._source, DataLoader):
                # So does a DataLoader that is iterated anew, to seed its workers.
                torch.empty((), dtype=torch.int64).random_(generator=self._generator)
            yield from self._source

    def __len__(self) -> int:
        return len(self._source)


class Draw:
    """Draws from a sampler or a stream in blocks, each from the random state in which the one before it ended.

    So what is drawn late does not depend on the random numbers that the model has used meanwhile, which differ from
    rank to rank. Where it has used none, rank zero's random state at the end is the one that one process would have.
    """

    def __init__(self, items: Iterator[Any], block: int = BLOCK) -> None:
        self._items, self._block = items, block
        self.drawn: list[Any] = []
        self._next = 0
        self._state: Any = None
        self._first: Any = None
        self._over = False

    def draw(self) -> None:
        """Have the next block at hand."""
        if self._over or self._next < len(self.drawn):
            return
        own = None if self._state is None else capture_rng()
        if own is not None:
            restore_rng(self._state)
        self.drawn, self._next = list(itertools.islice(self._items, self._block)), 0
        self._over = len(self.drawn) < self._block
        if own is not None and self._over and distributed.rank() == 0 and same_rng(own, self._first):
            return
        self._state = None if self._over else capture_rng()
        if own is None:
            self._first = self._state
        else:
            restore_rng(own)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._next >= len(self.drawn):
            self.draw()
            if self._next >= len(self.drawn):
                raise StopIteration
        self._next += 1
        return self.drawn[self._next - 1]


def slices(items: Iterator[Any], batch_size: int | None, drop_last: bool, rank: int, world: int) -> Iterator[Any]:
    """This rank's slice of each global batch of `world * batch_size` items.

    The last, incomplete global batch is completed from the start of the order to a multiple of `world`, or dropped.

    Args:
        items: Sample indices, or whole batches of them.
        batch_size: Items of a rank's batch; None where an item is a batch.
        drop_last: Whether to drop an incomplete global batch.
        rank: Which slice.
        world: Number of ranks.
    """
    size = (batch_size or 1) * world
    head: list[Any] = []
    while block := list(itertools.islice(items, size)):
        if not head:
            head = block[:world]
        if len(block) < size:
            if drop_last:
                return
            block += itertools.islice(itertools.cycle(head), -len(block) % world)
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
