"""Loggers under the argument names that Fabric has for them: `root_dir` is what `lightlite.loggers` call `save_dir`.

Their classes have names of their own: two of the name "CSVLogger" would make it ambiguous on a command line.
"""

from __future__ import annotations

from typing import Any

from lightlite import loggers
from lightlite.loggers import Logger
from lightlite.loggers.logger import rank_zero_experiment
from lightlite.utilities.files import PathLike

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger", "rank_zero_experiment"]


class FabricCSVLogger(loggers.CSVLogger):
    """A `lightlite.loggers.CSVLogger` that writes below `root_dir`; what follows are its other arguments."""

    def __init__(self, root_dir: PathLike, *args: Any, **kwargs: Any) -> None:
        super().__init__(root_dir, *args, **kwargs)


class FabricTensorBoardLogger(loggers.TensorBoardLogger):
    """A `lightlite.loggers.TensorBoardLogger` that writes below `root_dir`; what follows are its other arguments.

    Args:
        root_dir: The folder for all experiments.
        args: `name` and `version`.
        kwargs: Of the logger or of torch's `SummaryWriter`.
    """

    def __init__(self, root_dir: PathLike, *args: Any, **kwargs: Any) -> None:
        super().__init__(root_dir, *args, **kwargs)


CSVLogger = FabricCSVLogger
TensorBoardLogger = FabricTensorBoardLogger
