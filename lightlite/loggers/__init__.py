"""Where logged values go."""

from __future__ import annotations

from lightlite.loggers.csv_logs import CSVLogger
from lightlite.loggers.logger import DummyLogger, Logger
from lightlite.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger"]
