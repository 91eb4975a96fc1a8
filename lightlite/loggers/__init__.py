"""Where logged values go. The libraries of MLFlowLogger, TensorBoardLogger and WandbLogger are imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from lightlite.errors import missing_attribute
from lightlite.loggers.csv_logs import CSVLogger
from lightlite.loggers.logger import DummyLogger, Logger
from lightlite.loggers.mlflow import MLFlowLogger
from lightlite.loggers.tensorboard import TensorBoardLogger
from lightlite.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]


if not TYPE_CHECKING:  # or type checkers would take every name for one that exists

    def __getattr__(name: str) -> NoReturn:
        raise missing_attribute(__name__, name)
