"""The parser: jsonargparse's, with arguments of modules, data, trainers, callbacks, optimizers and schedulers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace, register_unresolvable_import_paths, set_parsing_settings
from jsonargparse.typing import class_from_function
from torch.optim import Optimizer

from lightlite.callbacks import Callback
from lightlite.cli.optimizers import Choice, Classes, LRSchedulerTypeTuple
from lightlite.datamodule import LightningDataModule
from lightlite.errors import MisconfigurationException
from lightlite.module import LightningModule
from lightlite.registry import AcceleratorRegistry, EnvironmentRegistry, PrecisionRegistry, Registry, StrategyRegistry
from lightlite.trainer import Trainer

__all__ = ["LightningArgumentParser", "Namespace", "class_of"]

register_unresolvable_import_paths(torch)  # functions of torch that do not say which module they are from
set_parsing_settings(config_read_mode_fsspec_enabled=True)


class LightningArgumentParser(ArgumentParser):
    """jsonargparse's parser, which also knows the classes that a Trainer works with.

    Args:
        args: As for jsonargparse's ArgumentParser.
        description: Shown by `--help`.
        env_prefix: What the names of environment variables begin with.
        default_env: Whether to read environment variables, such as PL_TRAINER__MAX_EPOCHS.
        kwargs: As for jsonargparse's ArgumentParser.

    Attributes:
        callback_keys: Where the arguments of callbacks are.
    """

    def __init__(
        self,
        *args: Any,
        description: str = "Trains, validates, tests and predicts with a LightningModule",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        self.optimizer_choices: dict[str, Choice] = {}
        self.lr_scheduler_choices: dict[str, Choice] = {}

    def add_lightning_class_args(
        self, lightning_class: Callable[..., Any], nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """Add the arguments of a class below a key.

        Args:
            lightning_class: A Trainer, LightningModule, LightningDataModule or Callback class, or a function that says
                by its annotation that it returns an instance of one.
            nested_key: The key, such as "model".
            subclass_mode: Whether the class itself is to be chosen, among its subclasses.
            required: Whether one has to be chosen.

        Returns:
            The keys of the arguments.

        Raises:
            MisconfigurationException: For anything else.
        """
        cls = class_of(lightning_class)
        if not issubclass(cls, (Trainer, LightningModule, LightningDataModule, Callback)):
            raise MisconfigurationException(
                f"add_lightning_class_args({cls.__qualname__}, {nested_key!r}): it is none of Trainer, "
                "LightningModule, LightningDataModule and Callback; give a subclass of one, or a function annotated "
                "to return one; for other classes there is add_class_arguments"
            )
        if issubclass(cls, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            self.add_subclass_arguments(cls, nested_key, fail_untyped=False, required=required)
            return [nested_key]
        if issubclass(cls, Trainer):
            _import_plugins()
        made = not issubclass(cls, Trainer)  # the trainer waits for the callbacks, so it is made at last
        added = self.add_class_arguments(cls, nested_key, fail_untyped=False, instantiate=made, sub_configs=True)
        return list(added)

    def add_optimizer_args(
        self, optimizer_class: Classes = (Optimizer,), nested_key: str = "optimizer", link_to: str = "AUTOMATIC"
    ) -> None:
        """Add the arguments of an optimizer below a key.

        Args:
            optimizer_class: Its class; a tuple of classes for a choice among their subclasses.
            nested_key: The key.
            link_to: The key of an argument which gets the class and its arguments. "AUTOMATIC" gives the module a
                `configure_optimizers` instead.

        Raises:
            MisconfigurationException: For a class that is no optimizer.
        """
        self._add_choice(optimizer_class, (Optimizer,), nested_key, skip="params")
        self.optimizer_choices[nested_key] = Choice(optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Classes = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Add the arguments of a learning-rate scheduler below a key.

        Args:
            lr_scheduler_class: Its class; a tuple of classes for a choice among their subclasses.
            nested_key: The key.
            link_to: As for `add_optimizer_args`.

        Raises:
            MisconfigurationException: For a class that is no scheduler.
        """
        self._add_choice(lr_scheduler_class, LRSchedulerTypeTuple, nested_key, skip="optimizer")
        self.lr_scheduler_choices[nested_key] = Choice(lr_scheduler_class, link_to)

    def _add_choice(self, classes: Classes, allowed: tuple[type, ...], key: str, skip: str) -> None:
        for cls in classes if isinstance(classes, tuple) else (classes,):
            if not (isinstance(cls, type) and issubclass(cls, allowed)):
                raise MisconfigurationException(
                    f"the arguments {key!r} were to be those of {cls!r}; give a subclass of "
                    f"{' or '.join(each.__name__ for each in allowed)}, or a tuple of them"
                )
        if isinstance(classes, tuple):
            self.add_subclass_arguments(classes, key, instantiate=False, fail_untyped=False, skip={skip})
        else:
            self.add_class_arguments(classes, key, instantiate=False, fail_untyped=False, skip={skip}, sub_configs=True)


@functools.cache
def _import_plugins() -> None:
    """Import what a Trainer may be given: jsonargparse knows short names of those classes only that are imported."""
    registries: list[Registry[Any]] = [AcceleratorRegistry, StrategyRegistry, PrecisionRegistry, EnvironmentRegistry]
    for registry in registries:
        registry.loadable()


def class_of(given: Callable[..., Any]) -> type:
    """A class as it is; of a function that makes an instance, a class that calls it.

    Raises:
        MisconfigurationException: For anything else.
    """
    if inspect.isclass(given):
        return given
    try:
        return class_from_function(given)
    except (ValueError, TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"{given!r} is neither a class nor a function annotated to return an instance of one: {error}"
        ) from None
