"""Hyper-parameters: the arguments of a module's `__init__`, kept for checkpoints and loggers."""

from __future__ import annotations

import copy
import inspect
import types
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any


class AttributeDict(dict[str, Any]):
    """A dict whose string keys are attributes too."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {key!r}; there are: {', '.join(self) or 'none'}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __repr__(self) -> str:
        return "\n".join(f"{key!r}: {value!r}" for key, value in sorted(self.items()))


class HyperparametersMixin:
    """Gives a class `save_hyperparameters` and `hparams`."""

    _log_hyperparams: bool = False
    _hparams_name: str | None = None

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of `__init__` under `self.hparams`, in checkpoints and in loggers.

        Call it in `__init__`. Subclasses' arguments are kept as well, when a base class calls it.

        Args:
            args: Names of the arguments to keep, or one object (dict, Namespace) that holds them; none means all.
            ignore: Names to leave out.
            frame: The frame of `__init__`, when it is not the caller.
            logger: Whether loggers get them.

        Raises:
            AttributeError: For a name that is not an argument.
        """
        if frame is None:
            current = inspect.currentframe()
            assert current is not None
            frame = current.f_back
        assert frame is not None
        given, name = _init_arguments(self, frame)
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if len(args) == 1 and not isinstance(args[0], str):
            name = next((key for key, value in given.items() if value is args[0]), None)
            kept = vars(args[0]) if isinstance(args[0], Namespace) else dict(args[0])
        else:
            unknown = [key for key in args if key not in given]
            if unknown:
                raise AttributeError(
                    f"save_hyperparameters: {unknown} are no arguments of __init__; those are {list(given)}"
                )
            kept = {key: given[key] for key in args} if args else given
        self._hparams_name = name
        self._log_hyperparams = logger
        self._set_hparams({key: value for key, value in kept.items() if key not in ignored})
        self._hparams_initial = AttributeDict(
            {key: value for key, value in copy.copy(self.hparams).items() if not hasattr(value, "parameters")}
        )

    def _set_hparams(self, values: Mapping[str, Any] | Namespace) -> None:
        values = vars(values) if isinstance(values, Namespace) else values
        self.hparams.update(values)

    @property
    def hparams(self) -> AttributeDict:
        """What `save_hyperparameters` kept: a dict with attribute access, open to change."""
        if "_hparams" not in self.__dict__:
            self.__dict__["_hparams"] = AttributeDict()
        return self.__dict__["_hparams"]  # type: ignore[no-any-return]

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of `hparams` as they were first kept."""
        kept: AttributeDict = self.__dict__.get("_hparams_initial", AttributeDict())
        return copy.deepcopy(kept)


def _init_arguments(instance: object, frame: types.FrameType) -> tuple[dict[str, Any], str | None]:
    """The arguments of every `__init__` of `instance` that is running, the innermost class's values first."""
    collected: dict[str, Any] = {}
    current: types.FrameType | None = frame
    while current is not None and current.f_code.co_name == "__init__":
        values = current.f_locals
        names = current.f_code.co_varnames[: current.f_code.co_argcount + current.f_code.co_kwonlyargcount]
        if not names or values.get(names[0]) is not instance:
            break
        own = {name: values[name] for name in names[1:] if name in values}
        flags = current.f_code.co_flags
        if flags & inspect.CO_VARKEYWORDS:
            extra = current.f_code.co_varnames[len(names) + bool(flags & inspect.CO_VARARGS)]
            own.update(values.get(extra, {}))
        collected = {**collected, **own}
        current = current.f_back
    return collected, "kwargs"
