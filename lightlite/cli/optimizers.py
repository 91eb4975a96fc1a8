"""Optimizers and learning-rate schedulers that are chosen on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightlite.module import LightningModule


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """PyTorch's, with the key of the value that it watches.

    Args:
        optimizer: Whose learning rate it lowers.
        monitor: The key under which the value was logged.
        args: As for PyTorch's.
        kwargs: As for PyTorch's.
    """

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]
OptimizerCallable: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""The type of an argument that makes an optimizer from parameters: `optimizer: OptimizerCallable: TypeAlias = Adam`."""
LRSchedulerCallable: TypeAlias = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
"""The type of an argument that makes a scheduler from an optimizer."""

Classes: TypeAlias = type | tuple[type, ...]


@dataclass(frozen=True)
class Choice:
    """An optimizer or scheduler among a parser's arguments.

    Attributes:
        classes: The class; as a tuple, those of whose subclasses one is chosen.
        link_to: Which argument gets the choice; "AUTOMATIC" where the module is given a `configure_optimizers`.
    """

    classes: Classes
    link_to: str

    @property
    def automatic(self) -> bool:
        """Whether the module is given a `configure_optimizers` that makes it."""
        return self.link_to == "AUTOMATIC"

    def specification(self, parsed: Any) -> dict[str, Any] | None:
        """What was parsed, as {"class_path": …, "init_args": …}; None where nothing was chosen."""
        if parsed is not None and not isinstance(parsed, Mapping):
            parsed = parsed.as_dict()
        if isinstance(self.classes, tuple):
            return parsed or None
        return {"class_path": f"{self.classes.__module__}.{self.classes.__qualname__}", "init_args": parsed or {}}


def instantiate_class(args: Any | tuple[Any, ...], init: Mapping[str, Any]) -> Any:
    """Make an object of a class that is told by its name.

    Args:
        args: The positional argument, or a tuple of them.
        init: {"class_path": "package.module.Class", "init_args": {…}}.
    """
    module, _, name = init["class_path"].rpartition(".")
    cls = getattr(import_module(module), name)
    return cls(*(args if isinstance(args, tuple) else (args,)), **init.get("init_args", {}))


def configure_from(
    module: LightningModule,
    hook: Callable[..., Any],
    optimizer: Mapping[str, Any],
    lr_scheduler: Mapping[str, Any] | None,
) -> Any:
    """The `configure_optimizers` of a module whose optimizer was chosen on the command line.

    The objects are made when a fit asks for them, so parameters which `configure_model` makes are among theirs.

    Args:
        module: The module.
        hook: `LightningCLI.configure_optimizers`, or what overrides it.
        optimizer: The optimizer's class and arguments.
        lr_scheduler: The scheduler's.
    """
    made = instantiate_class(module.parameters(), optimizer)
    return hook(module, made, None if lr_scheduler is None else instantiate_class(made, lr_scheduler))
