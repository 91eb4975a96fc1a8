"""Makes modules and data modules from checkpoints."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from lightlite import storage
from lightlite.errors import CheckpointError

C = TypeVar("C")


def module_from_checkpoint(
    cls: type[C], path: Any, map_location: Any, hparams_file: Any, strict: bool | None, overrides: dict[str, Any]
) -> C:
    """See `LightningModule.load_from_checkpoint`."""
    checkpoint = storage.read(path, "cpu" if map_location is None else map_location)
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} has no 'state_dict'; its keys are {', '.join(map(str, checkpoint))}")
    hparams = checkpoint.get("hyper_parameters", {}) if hparams_file is None else _from_yaml(hparams_file)
    module: Any = _make(cls, {**hparams, **overrides}, checkpoint.get("hparams_name"))
    module._set_hparams({**hparams, **overrides}) if hparams else None
    module.on_load_checkpoint(checkpoint)
    module.configure_model()
    wanted = getattr(module, "strict_loading", True) if strict is None else strict
    module.load_state_dict(checkpoint["state_dict"], strict=wanted)
    return module  # type: ignore[no-any-return]


def datamodule_from_checkpoint(cls: type[C], path: Any, map_location: Any, overrides: dict[str, Any]) -> C:
    """See `LightningDataModule.load_from_checkpoint`."""
    checkpoint = storage.read(path, "cpu" if map_location is None else map_location)
    hparams = checkpoint.get("datamodule_hyper_parameters", {})
    datamodule: Any = _make(cls, {**hparams, **overrides}, checkpoint.get("datamodule_hparams_name"))
    if cls.__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[cls.__qualname__])
    return datamodule  # type: ignore[no-any-return]


def _make(cls: type[C], arguments: dict[str, Any], name: str | None) -> C:
    parameters = inspect.signature(cls.__init__).parameters
    if name is not None and name in parameters and name not in ("args", "kwargs") and name not in arguments:
        return cls(**{name: arguments})  # the hyper-parameters were one argument, a dict or Namespace
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return cls(**arguments)
    return cls(**{key: value for key, value in arguments.items() if key in parameters})


def _from_yaml(path: Any) -> dict[str, Any]:
    import yaml

    with open(path) as file:
        return yaml.safe_load(file) or {}
