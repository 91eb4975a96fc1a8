"""Arguments of `__init__`, and attributes that may lie in the module, its hyper-parameters or the data module."""

from __future__ import annotations

import inspect
import pickle
import types
from collections.abc import MutableMapping, Sequence
from typing import Any

from lightlite.utilities.rank_zero import rank_zero_warn


class AttributeDict(dict[str, Any]):
    """A dict whose string keys are attributes too."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"there is no {key!r} in this {type(self).__name__}; {self._listed()}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        if key not in self:
            raise KeyError(f"there is no {key!r} to delete in this {type(self).__name__}; {self._listed()}")
        del self[key]

    def _listed(self) -> str:
        return f"there are: {', '.join(map(str, self)) or 'none'}"

    def __repr__(self) -> str:
        names = {f'"{key}":': value for key, value in sorted(self.items())}
        width = max(map(len, names), default=0)
        return "\n".join(f"{name:<{width}} {value}" for name, value in names.items())


def is_picklable(obj: object) -> bool:
    """Whether an object can be pickled."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Take out what cannot be pickled, with a warning that names it."""
    for key in [key for key, value in hparams.items() if not is_picklable(value)]:
        rank_zero_warn(
            f"the hyper-parameter {key!r} cannot be pickled and is left out; "
            f"save_hyperparameters(ignore=[{key!r}]) silences this"
        )
        del hparams[key]


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """What a class's `__init__` calls its object, its further positional and its further named arguments, if any."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
    kinds = {parameter.kind: parameter.name for parameter in parameters}
    further = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameters[0].name, kinds.get(further[0]), kinds.get(further[1])


def get_init_args(frame: types.FrameType) -> dict[str, Any]:
    """The arguments that a running `__init__` was called with, by name, what came as `**kwargs` included.

    Args:
        frame: Its frame; for that of another function there are none.
    """
    code, values = frame.f_code, frame.f_locals
    if code.co_name != "__init__":
        return {}
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    arguments = {name: values[name] for name in names[1:] if name in values}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        rest = code.co_varnames[len(names) + bool(code.co_flags & inspect.CO_VARARGS)]
        arguments.update(values.get(rest, {}))
    return arguments


def instance_in_init(frame: types.FrameType) -> Any:
    """The object that a running `__init__` makes; None for the frame of another function."""
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if frame.f_code.co_name == "__init__" and names else None


def collect_init_args(
    frame: types.FrameType, path_args: list[dict[str, Any]], inside: bool = False, classes: tuple[type, ...] = ()
) -> list[dict[str, Any]]:
    """The arguments of each `__init__` of the object that is being made, from the base class to the most derived.

    Args:
        frame: Where to begin to look: the frame of an `__init__`, or of what it has called.
        path_args: A list to append to.
        inside: Whether `frame` is one of these `__init__` already.
        classes: Types of which the object has to be.

    Returns:
        `path_args`.
    """
    current: types.FrameType | None = frame
    while current is not None:
        instance = instance_in_init(current)
        if instance is not None and (not classes or isinstance(instance, classes)):
            path_args.append(get_init_args(current))
            inside = True
        elif inside:
            break
        current = current.f_back
    return path_args


def save_hyperparameters(
    obj: Any, *args: Any, ignore: Sequence[str] | str | None = None, frame: types.FrameType | None = None
) -> None:
    """`obj.save_hyperparameters`, which see; for calls from `obj.__init__`."""
    caller = inspect.currentframe()
    assert caller is not None
    obj.save_hyperparameters(*args, ignore=ignore, frame=frame or caller.f_back)


def lightning_hasattr(model: Any, attribute: str) -> bool:
    """Whether a module, its hparams, or the data module or its hparams have an attribute."""
    return bool(_holders(model, attribute))


def lightning_getattr(model: Any, attribute: str) -> Any:
    """The attribute's value in the last of the module, its hparams, the data module and its hparams that has it.

    Raises:
        AttributeError: Where none has it.
    """
    holder = _require_holders(model, attribute)[-1]
    return holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute)


def lightning_setattr(model: Any, attribute: str, value: Any) -> None:
    """Set the attribute wherever it is: in the module, its hparams, the data module, its hparams.

    Raises:
        AttributeError: Where it is nowhere.
    """
    for holder in _require_holders(model, attribute):
        if isinstance(holder, dict):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)


def _require_holders(model: Any, attribute: str) -> list[Any]:
    holders = _holders(model, attribute)
    if not holders:
        raise AttributeError(
            f"{type(model).__name__} has no {attribute!r}, nor have its hparams or the data module; set "
            f"self.{attribute} in __init__, or keep it by save_hyperparameters()"
        )
    return holders


def _holders(model: Any, attribute: str) -> list[Any]:
    """What has the attribute: objects, and dicts of hyper-parameters."""
    trainer = getattr(model, "_trainer", None)
    owners = [model, getattr(trainer, "datamodule", None)]
    holders = []
    for owner in owners:
        if owner is not None and hasattr(owner, attribute):
            holders.append(owner)
        if attribute in getattr(owner, "hparams", ()):
            holders.append(owner.hparams)
    return holders
