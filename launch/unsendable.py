"""Finds out what in an object cannot be sent to the other ranks, and says where it is."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightlite.launch.transport import can_be_sent

MAX_DEPTH = 12


def explain(named: Mapping[str, Any]) -> str | None:
    """Which part of some objects cannot be sent, as a sentence with the path to it; None where all can be.

    Args:
        named: The objects, under the names that a user knows them by.
    """
    for name, value in named.items():
        if (error := can_be_sent(value)) is not None:
            return _explain(name, value, error)
    return None


def _explain(name: str, value: Any, error: Exception) -> str:
    owner, label, path = "", name, name
    seen = {id(value)}
    for _ in range(MAX_DEPTH):
        found = next(_culprits(value, seen), None)
        if found is None:
            break
        step, label, value, error = found
        owner, path = path, path + step
        seen.add(id(value))
    where = f"{owner} `{label}`" if owner else f"`{label}`"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{where} of type {kind} cannot be sent to the other ranks: {error}; {_advice(value)}"


def _advice(value: Any) -> str:
    if isinstance(value, types.GeneratorType):
        return (
            "keep a list, or the function that makes it, and start it in a hook that every rank runs, such as setup()"
        )
    if isinstance(value, _BaseDataLoaderIter):
        return "keep the DataLoader itself, and call iter() on it in a hook that every rank runs, such as setup()"
    return (
        "make it in a hook that every rank runs, such as setup(), or leave it out of the object's pickle "
        "(`__getstate__`)"
    )


def _culprits(value: Any, seen: set[int]) -> Iterator[tuple[str, str, Any, Exception]]:
    for step, label, child in _children(value):
        if id(child) not in seen and (error := can_be_sent(child)) is not None:
            yield step, label, child, error


def _children(value: Any) -> Iterator[tuple[str, str, Any]]:
    """`(step, label, child)`: what to append to the path, what to call the child, and the child."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", repr(key), child) for key, child in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", str(index), child) for index, child in enumerate(value))
    elif isinstance(value, functools.partial):
        for label in ("func", "args", "keywords"):
            yield f".{label}", label, getattr(value, label)
    elif isinstance(value, types.MethodType):
        yield ".__self__", "__self__", value.__self__
        yield from _children(value.__func__)
    elif isinstance(value, torch.jit.ScriptModule):
        return
    elif isinstance(value, types.FunctionType):
        yield from _reached_by(value)
    elif isinstance(value, type):
        yield from ((f".{name}", name, child) for name, child in vars(value).items() if not name.startswith("__"))
    else:
        yield from ((f".{name}", name, child) for name, child in _attributes(value).items())
        yield f".{type(value).__name__}", type(value).__name__, type(value)


def _reached_by(function: Callable[..., Any]) -> Iterator[tuple[str, str, Any]]:
    assert isinstance(function, types.FunctionType)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f".{name}", name, cell.cell_contents
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f".{name}", name, function.__globals__[name]


def _attributes(value: Any) -> dict[str, Any]:
    """What is pickled of an object, under the names a user would write; nothing of one that refuses by itself."""
    try:
        reduced = value.__reduce_ex__(5)
    except Exception:
        return {}
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if isinstance(state, tuple) and len(state) == 2:
        state = {**(state[0] or {}), **(state[1] or {})}
    attributes = dict(state) if isinstance(state, dict) else {}
    if isinstance(value, nn.Module):
        for registry in ("_parameters", "_buffers", "_modules"):
            attributes.update(attributes.pop(registry, {}))
    return attributes
