"""lightlite: a multi-device trainer for PyTorch.

import lightlite as pl

class Net(pl.LightningModule):
    def training_step(self, batch, batch_idx): ...
    def configure_optimizers(self): ...

pl.Trainer(devices=2).fit(Net(), loader)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lightlite.importing import without_collections

with without_collections():
    from lightlite.callbacks import Callback
    from lightlite.datamodule import LightningDataModule
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer
    from lightlite.utilities.seed import seed_everything

if TYPE_CHECKING:
    from lightlite.fabric import Fabric

try:
    __version__ = version("lightlite")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["Callback", "Fabric", "LightningDataModule", "LightningModule", "Trainer", "__version__", "seed_everything"]

_WHEN_FIRST_USED = (
    "accelerators", "callbacks", "cli", "compat", "demos", "fabric", "loggers", "plugins", "profilers", "strategies",
    "tuner", "utilities",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "Fabric":
        return import_module("lightlite.fabric").Fabric
    if name in _WHEN_FIRST_USED:
        return import_module(f"lightlite.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_WHEN_FIRST_USED]
