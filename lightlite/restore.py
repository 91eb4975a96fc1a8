"""Makes modules and data modules from checkpoints."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any, TypeVar

from packaging.version import Version

from lightlite import storage
from lightlite.errors import CheckpointError
from lightlite.hparams import CLASS_PATH, INSTANTIATOR, INSTANTIATORS

C = TypeVar("C")
JSONARGPARSE = "4.53"
"""The oldest version of jsonargparse that will do."""


def module_from_checkpoint(
    cls: type[C], path: Any, map_location: Any, hparams_file: Any, strict: bool | None, overrides: dict[str, Any]
) -> C:
    """See `LightningModule.load_from_checkpoint`."""
    checkpoint = storage.read(path, "cpu" if map_location is None else map_location)
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} has no 'state_dict'; its keys are {', '.join(map(str, checkpoint))}")
    hparams = checkpoint.get("hyper_parameters", {}) if hparams_file is None else _from_yaml(hparams_file)
    module: Any = _make(cls, {**hparams, **overrides}, checkpoint.get("hparams_name"))
    kept = {name: value for name, value in hparams.items() if name not in (INSTANTIATOR, CLASS_PATH)}
    module._set_hparams({**kept, **overrides}) if kept else None
    module.on_load_checkpoint(checkpoint)
    module.configure_model()
    wanted = getattr(module, "strict_loading", True) if strict is None else strict
    module.load_state_dict(checkpoint["state_dict"], strict=wanted)
    return module  # type: ignore[no-any-return]


def datamodule_from_checkpoint(
    cls: type[C], path: Any, map_location: Any, hparams_file: Any, overrides: dict[str, Any]
) -> C:
    """See `LightningDataModule.load_from_checkpoint`."""
    checkpoint = storage.read(path, "cpu" if map_location is None else map_location)
    stored = checkpoint.get("datamodule_hyper_parameters", {})
    hparams = stored if hparams_file is None else _from_yaml(hparams_file)
    datamodule: Any = _make(cls, {**hparams, **overrides}, checkpoint.get("datamodule_hparams_name"))
    if cls.__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[cls.__qualname__])
    return datamodule  # type: ignore[no-any-return]


def _make(cls: type[C], arguments: dict[str, Any], name: str | None) -> C:
    if INSTANTIATOR in arguments:
        return _make_parsed(cls, dict(arguments))
    parameters = inspect.signature(cls.__init__).parameters
    if name is not None and name in parameters and name not in ("args", "kwargs") and name not in arguments:
        return cls(**{name: arguments})  # the hyper-parameters were one argument, a dict or Namespace
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return cls(**arguments)
    return cls(**{key: value for key, value in arguments.items() if key in parameters})


def _make_parsed(cls: type[C], arguments: dict[str, Any]) -> C:
    """An instance from hyper-parameters as LightningCLI keeps them: parsed once more, objects within objects made."""
    marker = arguments.pop(INSTANTIATOR)
    if marker not in INSTANTIATORS:
        raise CheckpointError(
            f"the hyper-parameters say that {marker!r} made the object, which is not called: allowed are "
            f"{' and '.join(INSTANTIATORS)}; give load_from_checkpoint a checkpoint of LightningCLI, or one without "
            f"{INSTANTIATOR!r} among its hyper-parameters"
        )
    check_class_paths(arguments, "the checkpoint")
    if CLASS_PATH in arguments:
        chosen = imported(arguments[CLASS_PATH])
        if not issubclass(chosen, cls):
            raise CheckpointError(
                f"the checkpoint is one of {arguments[CLASS_PATH]}, which is no subclass of {cls.__name__}; call "
                "load_from_checkpoint of that class, or of a base of it"
            )
    else:
        names = inspect.signature(cls.__init__).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values()):
            arguments = {name: value for name, value in arguments.items() if name in names}
    return instantiate_module(cls, arguments)


def instantiate_module(class_type: type[C], config: Mapping[str, Any]) -> C:
    """Make an object from hyper-parameters as LightningCLI keeps them.

    Args:
        class_type: Its class, or the base of the class that `config` names.
        config: Its arguments as they were parsed; under "_class_path" the class.
    """
    require_jsonargparse("load_from_checkpoint of an object that LightningCLI made")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    if CLASS_PATH in config:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        own = {name: value for name, value in config.items() if name != CLASS_PATH}
        config = {"class_path": config[CLASS_PATH], "dict_kwargs": own}
    else:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
    made: C = parser.instantiate(parser.parse_object({"module": config})).module
    return made


def imported(class_path: str) -> Any:
    """What a dotted name stands for, among the modules imported so far; None where there is nothing of that name."""
    parts = class_path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found
    return None


def check_class_paths(hparams: Any, source: str) -> None:
    """See that hyper-parameters name no class that the program has not imported itself.

    A checkpoint is data: reading one is not to import what it names.

    Raises:
        CheckpointError: Naming the class.
    """
    if isinstance(hparams, Mapping):
        for key, value in hparams.items():
            found = imported(str(value)) if key in ("class_path", CLASS_PATH) else object
            if not isinstance(found, type) and "return" not in getattr(found, "__annotations__", {}):
                raise CheckpointError(
                    f"the hyper-parameters in {source} name the class {value!r}, which this program has not imported; "
                    "nothing is imported because a checkpoint says so: if you trust it, import the module first"
                )
            check_class_paths(value, source)
    elif isinstance(hparams, (list, tuple)):
        for value in hparams:
            check_class_paths(value, source)


def require_jsonargparse(wanted_by: str) -> None:
    """See that jsonargparse is installed, with what it needs to read signatures.

    Raises:
        ModuleNotFoundError: Saying how to install it.
    """
    lacking = ""
    for name in ("jsonargparse", "docstring_parser", "typeshed_client"):
        try:
            import_module(name)
        except ModuleNotFoundError:
            lacking = f"{name} is not installed"
            break
    if not lacking and Version(version("jsonargparse")) < Version(JSONARGPARSE):
        lacking = f"jsonargparse {version('jsonargparse')} is installed"
    if lacking:
        wanted = f"jsonargparse[signatures]>={JSONARGPARSE}"
        raise ModuleNotFoundError(f'{wanted_by} needs {wanted}, but {lacking}: pip install "{wanted}"')


def _from_yaml(path: Any) -> dict[str, Any]:
    import yaml

    with open(path) as file:
        return yaml.safe_load(file) or {}
