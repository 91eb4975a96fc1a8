"""Walks through nests: whatever mixture of containers, records and tensors a batch or an output is made of.

A nest is a tensor, or a list, tuple, named tuple, deque, mapping or dataclass instance of nests. Everything else in it
is a leaf that stays as it is, except that `move_to` asks objects that have a `to` method to move themselves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightlite.errors import MisconfigurationException

_PLAIN = (str, bytes, int, float, complex, type(None), type)
_ABSENT = object()


def apply_to_tensors(
    nest: Any, function: Callable[[Tensor], Any], on_movable: Callable[[Any], Any] | None = None
) -> Any:
    """`nest` with each tensor replaced by `function(tensor)`.

    Types of containers are kept, named tuples, `defaultdict`s, subclasses and frozen dataclasses included. An object
    that occurs several times is handled once and shared in the result too. Containers in which nothing changed are
    returned as they are; others are copied, never changed in place.

    Args:
        nest: Any nest; objects that are no containers pass through.
        function: Called once for each distinct tensor.
        on_movable: Called instead of looking into an object that has a `to` method, container or not.

    Raises:
        MisconfigurationException: Where a mapping that has to change cannot be made anew from a dict.
    """
    return _Walk(function, on_movable).visit(nest)


def move_to(
    nest: Any,
    device: torch.device,
    non_blocking: bool = False,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """`nest` with its tensors on `device`; see `apply_to_tensors` for what is kept.

    Objects with a `to` method (packed sequences, batches of other libraries) are moved by `object.to(device)`, and kept
    where that returns None. Tensors that are there already are not copied.

    Args:
        nest: Any nest.
        device: Where to.
        non_blocking: Whether copies may still be under way on return; of use from page-locked memory only.
        convert: Applied to each tensor before it moves, e.g. to a dtype that the device has.
    """

    def move(tensor: Tensor) -> Tensor:
        return (tensor if convert is None else convert(tensor)).to(device, non_blocking=non_blocking)

    def move_object(thing: Any) -> Any:
        moved = thing.to(device)
        return thing if moved is None else moved

    return _Walk(move, move_object).visit(nest)


def as_tensors(nest: Any, device: torch.device) -> Any:
    """`nest` with its numbers and NumPy arrays made tensors, and all of them on `device`; see `move_to`."""

    def convert(leaf: Any) -> Any:
        is_value = isinstance(leaf, (bool, int, float)) or type(leaf).__module__ == "numpy"
        return torch.as_tensor(leaf, device=device) if is_value else leaf

    return move_to(_Walk(lambda tensor: tensor, on_leaf=convert).visit(nest), device)


class _Walk:
    """One pass through one nest; remembers what it met, so that shared things stay shared."""

    def __init__(
        self,
        on_tensor: Callable[[Tensor], Any],
        on_movable: Callable[[Any], Any] | None = None,
        on_leaf: Callable[[Any], Any] | None = None,
    ) -> None:
        self.on_tensor = on_tensor
        self.on_movable = on_movable
        self.on_leaf = on_leaf
        # The original is kept beside its result, so that its id cannot be given to another object meanwhile.
        self.done: dict[int, tuple[Any, Any]] = {}

    def visit(self, nest: Any) -> Any:
        if isinstance(nest, _PLAIN):
            return nest if self.on_leaf is None else self.on_leaf(nest)
        if id(nest) in self.done:
            return self.done[id(nest)][1]
        result = self._rebuild(nest)
        self.done[id(nest)] = (nest, result)
        return result

    def _rebuild(self, nest: Any) -> Any:
        if isinstance(nest, Tensor):
            return self.on_tensor(nest)
        # Before the containers: a PackedSequence is a named tuple, other libraries' batches are dicts.
        if self.on_movable is not None and callable(getattr(nest, "to", None)):
            return self.on_movable(nest)
        if isinstance(nest, (list, tuple, deque)):
            return self._sequence(nest)
        if isinstance(nest, Mapping):
            return self._mapping(nest)
        if dataclasses.is_dataclass(nest):
            return self._record(nest)
        return nest if self.on_leaf is None else self.on_leaf(nest)

    def _sequence(self, nest: Any) -> Any:
        values = [self.visit(value) for value in nest]
        if _same(nest, values):
            return nest
        kind = type(nest)
        if kind is list:
            return values
        if isinstance(nest, tuple):
            return kind._make(values) if hasattr(kind, "_make") else kind(values)
        result = copy.copy(nest)
        for index, value in enumerate(values):
            result[index] = value
        return result

    def _mapping(self, nest: Mapping[Any, Any]) -> Any:
        values = {key: self.visit(value) for key, value in nest.items()}
        if _same(nest.values(), values.values()):
            return nest
        if type(nest) is dict:
            return values
        if isinstance(nest, dict):
            result = copy.copy(nest)
            for key, value in values.items():
                result[key] = value
            return result
        try:
            return type(nest)(values)  # type: ignore[call-arg]
        except TypeError as error:
            name = type(nest).__qualname__
            raise MisconfigurationException(
                f"a mapping of type {name} holds tensors that have to be replaced, but {name}(dict) fails: {error}. "
                f"Use a dict or a dataclass, or give {name} a method `to(device)` that returns the moved object."
            ) from error

    def _record(self, nest: Any) -> Any:
        names = [field.name for field in dataclasses.fields(nest)]
        values = {name: getattr(nest, name, _ABSENT) for name in names}
        changed = {name: new for name, old in values.items() if (new := self.visit(old)) is not old}
        if not changed:
            return nest
        result = copy.copy(nest)
        for name, value in changed.items():
            object.__setattr__(result, name, value)  # frozen dataclasses too
        return result


def _same(old: Iterable[Any], new: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(old, new, strict=True))
