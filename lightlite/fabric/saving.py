"""Files of a user's own loop: the states of what is in a dictionary, under the names it has there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightlite.errors import CheckpointError
from lightlite.fabric.wrappers import unwrap
from lightlite.interfaces import Strategy

Filters = Mapping[str, Callable[[str, Any], bool]]


def check_filter(filters: Any, state: Mapping[str, Any]) -> None:
    """The argument `filter` of `Fabric.save`.

    Raises:
        TypeError: For anything but a dict of functions.
        ValueError: For a name that `state` has not.
    """
    if not isinstance(filters, Mapping) or not all(callable(keep) for keep in filters.values()):
        raise TypeError(
            f"fabric.save(filter={filters!r}); give a dict from a name in state to a function (key, value) -> bool"
        )
    unknown = filters.keys() - state.keys()
    if unknown:
        raise ValueError(f"fabric.save(filter=…) names {sorted(unknown)}, but state has {', '.join(map(repr, state))}")


def collect(state: Mapping[str, Any], filters: Filters, strategy: Strategy) -> dict[str, Any]:
    """What `Fabric.save` writes: the state-dict of whatever has one, other values as they are."""
    content: dict[str, Any] = {}
    for name, value in state.items():
        thing = unwrap(value)
        if isinstance(thing, Optimizer):
            found: Any = strategy.optimizer_state_dict(thing)
        else:
            found = thing.state_dict() if _is_stateful(thing) else thing
        if name in filters and isinstance(found, Mapping):
            found = {key: item for key, item in found.items() if filters[name](key, item)}
        content[name] = found
    return content


def restore(path: str | Path, state: Any, strict: bool, strategy: Strategy) -> dict[str, Any]:
    """Put a file's content back into `state`; see `Fabric.load`."""
    if state is not None and not isinstance(state, MutableMapping):
        kind = type(unwrap(state)).__name__
        raise TypeError(
            f"fabric.load({str(path)!r}, …) was given a {kind} as state; give a dict by name, as in "
            "{'model': model}; a file that holds nothing but one state-dict is for fabric.load_raw"
        )
    content = strategy.load_checkpoint(path)
    if not state:
        return content
    missing = [name for name in state if name not in content]
    if missing and strict:
        raise CheckpointError(
            f"{path} has no {', '.join(map(repr, missing))}; it holds {', '.join(map(repr, content))}. To leave as it "
            "is what is missing there, pass strict=False"
        )
    for name in [name for name in state if name in content]:
        kept, thing = content.pop(name), unwrap(state[name])
        if _is_stateful(thing):
            put_back(thing, kept, strict, strategy)
        else:
            state[name] = kept
    return content


def put_back(thing: Any, kept: Any, strict: bool, strategy: Strategy) -> None:
    """Load the state-dict of one object."""
    if isinstance(thing, nn.Module):
        strategy.load_module_state(kept, strict, thing)
    elif isinstance(thing, Optimizer):
        strategy.load_optimizer_state(thing, kept)
    else:
        thing.load_state_dict(kept)


def _is_stateful(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))
