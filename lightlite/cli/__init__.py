"""LightningCLI: a command line and configuration files for a module, its data and the Trainer, by jsonargparse."""

from __future__ import annotations

from lightlite.restore import require_jsonargparse

require_jsonargparse("lightlite.cli")

from lightlite.cli.command import ArgsType, LightningCLI  # noqa: E402
from lightlite.cli.optimizers import (  # noqa: E402
    LRSchedulerCallable,
    LRSchedulerType,
    LRSchedulerTypeTuple,
    LRSchedulerTypeUnion,
    OptimizerCallable,
    ReduceLROnPlateau,
    instantiate_class,
)
from lightlite.cli.parser import LightningArgumentParser, Namespace  # noqa: E402
from lightlite.cli.save_config import SaveConfigCallback  # noqa: E402
from lightlite.restore import instantiate_module  # noqa: E402

__all__ = [
    "ArgsType",
    "LRSchedulerCallable",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "LightningArgumentParser",
    "LightningCLI",
    "Namespace",
    "OptimizerCallable",
    "ReduceLROnPlateau",
    "SaveConfigCallback",
    "instantiate_class",
    "instantiate_module",
]
