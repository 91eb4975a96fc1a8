"""Hyper-parameters: the arguments of a module's `__init__`, kept for checkpoints and loggers."""

from __future__ import annotations

import copy
import inspect
import types
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from lightlite.utilities.parsing import AttributeDict as AttributeDict
from lightlite.utilities.parsing import get_init_args, instance_in_init

CLASS_PATH = "_class_path"
"""The hyper-parameter that tells an object's class, where it was chosen on the command line."""
INSTANTIATOR = "_instantiator"
"""The hyper-parameter that marks the others as parsed, not as `__init__` was given them."""
INSTANTIATORS = (
    "pytorch_lightning.cli.instantiate_module",  # this one is written: it is what Lightning knows as well
    "lightning.pytorch.cli.instantiate_module",
)

_given: ContextVar[tuple[type, dict[str, Any]] | None] = ContextVar("_given", default=None)


@contextmanager
def given_hyperparameters(owner: type, values: Mapping[str, Any]) -> Iterator[None]:
    """Within it, `save_hyperparameters` of an `owner` keeps `values`, rather than what `__init__` was given.

    Args:
        owner: The class whose instance is made.
        values: What was parsed for it, as plain data.
    """
    token = _given.set((owner, {**values, INSTANTIATOR: INSTANTIATORS[0]}))
    try:
        yield
    finally:
        _given.reset(token)


class HyperparametersMixin:
    """Gives a class `save_hyperparameters` and `hparams`."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "hyper_parameters"
    """Under which key a checkpoint has them."""
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "hparams_name"
    """Under which key it has the name of the argument of `__init__` that they were."""
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "hparams_type"
    """Accepted for compatibility: nothing is written under it."""

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
        parsed = _given.get()
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if len(args) == 1 and not isinstance(args[0], str):
            name = next((key for key, value in given.items() if value is args[0]), None)
            kept = vars(args[0]) if isinstance(args[0], Namespace) else dict(args[0])
        else:
            if parsed is not None and isinstance(self, parsed[0]):
                given = parsed[1]
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
        if instance_in_init(current) is not instance:
            break
        collected = {**collected, **get_init_args(current)}
        current = current.f_back
    return collected, "kwargs"
