"""What checkpoints keep of a command line, and what a command line takes from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lightlite import storage
from lightlite.cli.parser import LightningArgumentParser, Namespace
from lightlite.hparams import CLASS_PATH, INSTANTIATOR, given_hyperparameters
from lightlite.restore import check_class_paths, imported


class Maker:
    """Makes a module or data module, whose `save_hyperparameters` keeps what was parsed for it.

    Args:
        cls: The class that the parser has; with a choice among its subclasses, their base.
        key: Where it is in the configuration.
        parser: The parser.
        config: What it parsed.
    """

    def __init__(self, cls: type, key: str, parser: LightningArgumentParser, config: Namespace) -> None:
        text = parser.dump(config, skip_link_targets=False, skip_unset=False, format="yaml")
        parsed = yaml.safe_load(text).get(key) or {}
        self.cls, self.key, self.hparams = cls, key, parsed
        if "class_path" in parsed:
            self.cls = imported(parsed["class_path"])
            self.hparams = {
                CLASS_PATH: parsed["class_path"], **parsed.get("init_args", {}), **parsed.get("dict_kwargs", {})
            }  # fmt: skip

    def __call__(
        self, class_type: type, *args: Any, applied_instantiation_links: Mapping[str, Any], **kwargs: Any
    ) -> Any:
        """Make an instance; one of another class is a part of the one wanted, and keeps what its `__init__` gets."""
        if class_type is not self.cls or hasattr(class_type, "wrapped_function"):  # a function's are not the class's
            return class_type(*args, **kwargs)
        for target, value in applied_instantiation_links.items():
            key, _, name = target.partition(".")
            if key == self.key:
                _set_nested(self.hparams, name.removeprefix("init_args."), value)
        with given_hyperparameters(class_type, self.hparams):
            return class_type(*args, **kwargs)


def _set_nested(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        values = values[parent]
    values[last] = value


def take_hyperparameters(parser: LightningArgumentParser, path: str, class_path: str | None, choice: bool) -> bool:
    """Let the hyper-parameters in a checkpoint be the defaults of the module's arguments.

    What is said on the command line or in a configuration file comes before them. Those that the parser has no argument
    for are left alone, as `load_from_checkpoint` does.

    Args:
        parser: The parser.
        path: The checkpoint.
        class_path: The module's class, where one was chosen.
        choice: Whether the module's class is a choice.

    Returns:
        Whether there were any.

    Raises:
        CheckpointError: For a class that the program has not imported.
    """
    hparams = dict(storage.read(path).get("hyper_parameters", {}))
    hparams.pop(INSTANTIATOR, None)
    check_class_paths(hparams, path)
    class_path = hparams.pop(CLASS_PATH, class_path)
    if not hparams:
        return False
    if choice:
        if class_path is not None:
            parser.set_defaults({"model": {"class_path": class_path, "dict_kwargs": hparams}})
        return class_path is not None
    for name, value in hparams.items():
        try:
            parser.set_defaults({f"model.{name}": value})
        except KeyError:
            continue
    return True
