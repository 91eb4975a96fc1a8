"""lightlite: a multi-device trainer for PyTorch.

import lightlite as pl

class Net(pl.LightningModule):
    def training_step(self, batch, batch_idx): ...
    def configure_optimizers(self): ...

pl.Trainer(devices=2).fit(Net(), loader)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from lightlite.callbacks import Callback
from lightlite.datamodule import LightningDataModule
from lightlite.module import LightningModule
from lightlite.trainer import Trainer
from lightlite.utilities.seed import seed_everything

try:
    __version__ = version("lightlite")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["Callback", "LightningDataModule", "LightningModule", "Trainer", "__version__", "seed_everything"]
