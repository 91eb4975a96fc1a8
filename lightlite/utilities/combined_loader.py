"""Several iterables as one: drawn from together, or one after the other.

The four modes, names and semantics are those of Lightning 2.x's `CombinedLoader`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Self

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")
_OVER = object()
_PLAIN = (int, float, str)


class CombinedLoader(Iterable[tuple[Any, int, int]]):
    """Draws from several iterables, and yields `(batch, batch_idx, dataloader_idx)`.

    A Trainer takes one wherever it takes loaders; with several ranks, what is in it is dealt out as other loaders are.

    Args:
        iterables: A nest of iterables, of any depth: dicts, lists, tuples, named tuples. A list of numbers, strings or
            tensors is an iterable itself.
        mode: When the end is reached, and what a batch is. "min_size": a nest like `iterables`, until the shortest is
            over; "max_size_cycle": the same, until the longest is over, while the others start over; "max_size": the
            same, with None in place of those that are over; "sequential": the batches of one iterable after the other,
            `batch_idx` counted within each, and `dataloader_idx` saying which it is.

    Raises:
        ValueError: For another mode.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(f"CombinedLoader(mode={mode!r}): allowed are {', '.join(map(repr, MODES))}")
        self._iterables, self._mode = iterables, mode
        self._flattened: list[Any] = []
        whole = not _is_container(iterables) or all(isinstance(part, _PLAIN) for part in _children(iterables))
        self._layout = self._number(iterables) if whole else self._number_children(iterables)
        self._limits: list[int | float] | None = None
        self._drawn: Iterator[tuple[Any, int, int]] | None = None

    def _number(self, nest: Any) -> Any:
        if is_nest(nest):
            return self._number_children(nest)
        self._flattened.append(nest)
        return len(self._flattened) - 1

    def _number_children(self, nest: Any) -> Any:
        return _like(nest, [self._number(child) for child in _children(nest)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None}

    @property
    def mode(self) -> str:
        """When the end is reached, and what a batch is."""
        return self._mode

    @property
    def iterables(self) -> Any:
        """The nest of iterables."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a flat list. May be set, to as many others."""
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        if len(flattened) != len(self._flattened):
            raise ValueError(
                f"CombinedLoader.flattened was set to {len(flattened)} iterables; it has {len(self._flattened)}, give "
                "as many"
            )
        self._flattened = list(flattened)
        self._iterables = self.unflatten(flattened)

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches to take of each iterable; None for all. May be set to one number for every one."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        if limits is not None and len(limits) != len(self._flattened):
            raise ValueError(
                f"CombinedLoader.limits was set to {len(limits)} numbers; give {len(self._flattened)}, one for each "
                "iterable, or one number for all"
            )
        self._limits = limits

    @property
    def sampler(self) -> Any:
        """The iterables' samplers, nested as they are."""
        return self.unflatten([getattr(part, "sampler", None) for part in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The iterables' batch samplers, nested as they are."""
        return self.unflatten([getattr(part, "batch_sampler", None) for part in self._flattened])

    def unflatten(self, values: Sequence[Any]) -> Any:
        """`values`, one for each iterable, nested as the iterables are."""
        return _filled(self._layout, values)

    def __iter__(self) -> Self:
        if self._mode == "sequential":
            self._drawn = self._in_turn()
        else:
            running = [iter(part) for part in self._flattened]
            together = draw_together(self._mode, running, lambda index: iter(self._flattened[index]))
            stop = None if self._limits is None or math.isinf(self._count()) else int(self._count())
            self._drawn = (
                (self.unflatten(batches), index, 0) for index, batches in enumerate(itertools.islice(together, stop))
            )
        return self

    def _in_turn(self) -> Iterator[tuple[Any, int, int]]:
        limits = self._limits or [math.inf] * len(self._flattened)
        for which, (part, limit) in enumerate(zip(self._flattened, limits, strict=True)):
            stop = None if math.isinf(limit) else int(limit)
            for index, batch in enumerate(itertools.islice(part, stop)):
                yield batch, index, which

    def __next__(self) -> tuple[Any, int, int]:
        if self._drawn is None:
            raise RuntimeError("next(CombinedLoader) before iter(CombinedLoader); call iter() first, or use `for`")
        return next(self._drawn)

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: Where it depends on an iterable that has no length.
        """
        count = self._count()
        if math.isinf(count):
            raise TypeError(f"CombinedLoader(mode={self._mode!r}) has no length: one of its iterables has none")
        return int(count)

    def _count(self) -> int | float:
        lengths = [math.inf if length is None else length for length in map(sized_len, self._flattened)]
        limits = self._limits or [math.inf] * len(lengths)
        return combined_length(self._mode, [min(pair) for pair in zip(lengths, limits, strict=True)])

    def reset(self) -> None:
        """Forget the place, and end the workers that were started."""
        self._drawn = None
        for part in self._flattened:
            workers: Any = getattr(part, "_iterator", None)
            if hasattr(workers, "_shutdown_workers"):
                workers._shutdown_workers()
            if workers is not None:
                object.__setattr__(part, "_iterator", None)


def draw_together(
    mode: str, running: list[Iterator[Any]], restart: Callable[[int], Iterator[Any]], over: Iterable[int] = ()
) -> Iterator[list[Any]]:
    """A list of batches at a time, one of each iterator.

    Args:
        mode: "min_size", "max_size_cycle" or "max_size".
        running: The iterators.
        restart: Begins the iterable of an index anew, for "max_size_cycle".
        over: Indices of those that have been over before.

    Raises:
        ValueError: Where an iterable that is to start over yields nothing.
    """
    if mode == "min_size":
        return map(list, zip(*running, strict=False))
    return _draw_to_the_end(running) if mode == "max_size" else _draw_cycling(running, restart, set(over))


def _draw_to_the_end(running: list[Iterator[Any]]) -> Iterator[list[Any]]:
    while True:
        batches = [next(iterator, _OVER) for iterator in running]
        if all(batch is _OVER for batch in batches):
            return
        yield [None if batch is _OVER else batch for batch in batches]


def _draw_cycling(
    running: list[Iterator[Any]], restart: Callable[[int], Iterator[Any]], over: set[int]
) -> Iterator[list[Any]]:
    while running:
        batches = []
        for index in range(len(running)):
            batch = next(running[index], _OVER)
            if batch is _OVER:
                over.add(index)
                if len(over) == len(running):
                    return
                running[index] = restart(index)
                batch = next(running[index], _OVER)
            if batch is _OVER:
                raise ValueError(f"iterable {index} of CombinedLoader(mode='max_size_cycle') yields nothing")
            batches.append(batch)
        yield batches


def combined_length(mode: str, lengths: Sequence[int | float]) -> int | float:
    """Number of batches of iterables of these lengths, of which infinity stands for an unknown one."""
    if mode == "sequential":
        return sum(lengths)
    return (min if mode == "min_size" else max)(lengths, default=0)


def sized_len(iterable: Any) -> int | None:
    """`len(iterable)`; None where it has no length."""
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return None


def is_nest(loaders: Any) -> bool:
    """Whether this is a container of loaders, rather than one loader.

    A dict is. A list or tuple is, if there are iterables in it and no data: a list of tensors, or of tuples of them, is
    a loader itself, whose batches these are.
    """
    if isinstance(loaders, Mapping):
        return True
    return _is_container(loaders) and bool(loaders) and all(map(_is_loader, loaders))


def _is_loader(thing: Any) -> bool:
    if _is_container(thing):
        return bool(thing) and all(map(_is_loader, _children(thing)))
    data = isinstance(thing, (Tensor, str, bytes)) or hasattr(thing, "dtype")
    return not data and (hasattr(thing, "__iter__") or hasattr(thing, "__getitem__"))


def _is_container(thing: Any) -> bool:
    return isinstance(thing, (Mapping, list, tuple, deque))


def _children(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, Mapping) else list(container)


def _like(container: Any, values: list[Any]) -> Any:
    """A container of the same type and keys, with other values."""
    if type(container) is dict:
        return dict(zip(container, values, strict=True))
    if isinstance(container, Mapping):
        result: Any = copy.copy(container)
        for key, value in zip(container, values, strict=True):
            result[key] = value
        return result
    kind: Any = type(container)
    return kind._make(values) if hasattr(kind, "_make") else kind(values)


def _filled(layout: Any, values: Sequence[Any]) -> Any:
    """A layout of indices, with the values of these indices in their places."""
    if isinstance(layout, int):
        return values[layout]
    return _like(layout, [_filled(part, values) for part in _children(layout)])
