"""Loggers under the argument names that Fabric has for them: `root_dir` is what `lightlite.loggers` call `save_dir`.

They are functions: a class of the same name beside the Trainer's would make "CSVLogger" ambiguous on a command line.
"""

from __future__ import annotations

from typing import Any

from lightlite import loggers
from lightlite.loggers import Logger
from lightlite.loggers.logger import rank_zero_experiment
from lightlite.utilities.files import PathLike

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger", "rank_zero_experiment"]


def CSVLogger(root_dir: PathLike, *args: Any, **kwargs: Any) -> loggers.CSVLogger:
    """A `lightlite.loggers.CSVLogger` that writes below `root_dir`; what follows are its other arguments."""
    return loggers.CSVLogger(root_dir, *args, **kwargs)


def TensorBoardLogger(root_dir: PathLike, *args: Any, **kwargs: Any) -> loggers.TensorBoardLogger:
    """A `lightlite.loggers.TensorBoardLogger` that writes below `root_dir`; what follows are its other arguments.

    Args:
        root_dir: The folder for all experiments.
        args: `name` and `version`.
        kwargs: Of the logger or of torch's `SummaryWriter`.
    """
    return loggers.TensorBoardLogger(root_dir, *args, **kwargs)
