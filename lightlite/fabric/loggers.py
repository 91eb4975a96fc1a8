"""Loggers under the argument names that Fabric has for them."""

from __future__ import annotations

from typing import Any

from lightlite import loggers
from lightlite.loggers import Logger
from lightlite.loggers.logger import rank_zero_experiment
from lightlite.utilities.files import PathLike

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger", "rank_zero_experiment"]


class CSVLogger(loggers.CSVLogger):
    """`lightlite.loggers.CSVLogger`, whose first argument is called `root_dir` here."""

    def __init__(
        self,
        root_dir: PathLike,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(root_dir, name, version, prefix, flush_logs_every_n_steps)


class TensorBoardLogger(loggers.TensorBoardLogger):
    """`lightlite.loggers.TensorBoardLogger`, whose first argument is called `root_dir` here."""

    def __init__(
        self,
        root_dir: PathLike,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root_dir,
            name=name,
            version=version,
            default_hp_metric=default_hp_metric,
            prefix=prefix,
            sub_dir=sub_dir,
            **kwargs,
        )
