"""A logger that needs nothing: a CSV file of values, a YAML file of hyper-parameters."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightlite.loggers.logger import (
    PathLike,
    VersionedLogger,
    as_dict,
    as_number,
    rank_zero_experiment,
    write_hparams,
)
from lightlite.utilities import files
from lightlite.utilities.rank_zero import rank_zero_only


class ExperimentWriter:
    """Writes one run's files.

    Rows collect in memory and are appended to the file. A file that is there already is continued; a value of a
    new name adds a column to the rows written before.

    Args:
        log_dir: The run's folder; made where it is missing.
    """

    NAME_METRICS_FILE = "metrics.csv"
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.metrics: list[dict[str, Any]] = []
        self.hparams: dict[str, Any] = {}
        self._hparams_wait = False
        self.metrics_file_path = os.path.join(log_dir, self.NAME_METRICS_FILE)
        files.make_folder(log_dir)
        files.remove(f"{self.metrics_file_path}.tmp")  # half a file of a killed run
        self._columns, self.rows_written = self._continue()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; without a step, its number is the row's."""
        row = {name: as_number(value) for name, value in metrics.items()}
        row["step"] = self.rows_written + len(self.metrics) if step is None else step
        self.metrics.append(row)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Add to the hyper-parameters."""
        self.hparams.update(params)
        self._hparams_wait = True

    def save(self) -> None:
        """Append the collected rows to the file, and write the hyper-parameters where there are new ones."""
        if self._hparams_wait:
            write_hparams(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)
            self._hparams_wait = False
        if not self.metrics:
            return
        names = set().union(*self.metrics)
        if not names.issubset(self._columns) or files.is_remote(self.metrics_file_path):
            self._rewrite(sorted(names.union(self._columns)), [*self._read(), *self.metrics])
        else:
            with open(self.metrics_file_path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerows(self.metrics)
        self.rows_written += len(self.metrics)
        self.metrics = []

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` rows of the file. The file that holds more is kept as `metrics.csv.bak`."""
        kept = self._read()
        if len(kept) <= rows:
            return
        with files.open_text(self.metrics_file_path) as file:
            files.write_text(f"{self.metrics_file_path}.bak", file.read())
        columns = [name for name in self._columns if any(row[name] for row in kept[:rows])]
        self._rewrite(columns, kept[:rows])
        self.rows_written = min(rows, len(kept))

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.metrics_file_path, text.getvalue())
        self._columns = columns

    def _continue(self) -> tuple[list[str], int]:
        rows = self._read()
        return (list(rows[0]) if rows else []), len(rows)

    def _read(self) -> list[dict[str, Any]]:
        if not files.exists(self.metrics_file_path):
            return []
        with files.open_text(self.metrics_file_path) as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            # The last line of a killed run may be half a line.
            files.write_text(self.metrics_file_path, whole)
        return list(csv.DictReader(io.StringIO(whole, newline="")))


class CSVLogger(VersionedLogger):
    """Logs to `save_dir/name/version_N/metrics.csv`, a row per call, and `hparams.yaml` beside it.

    Args:
        save_dir: The folder for all experiments.
        name: The experiment's; "" or None for no folder of its own.
        version: A number, or a string that becomes the folder's name; None for the next free number. The files of
            a version that exists already are continued.
        prefix: Put before every value's name, with a "-".
        flush_logs_every_n_steps: Rows are written each time that many steps are complete, and at the end.
    """

    saves_by_itself = True

    def __init__(
        self,
        save_dir: PathLike,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._flush_logs_every_n_steps = max(1, flush_logs_every_n_steps)
        self._flushes = 0
        self._experiment: ExperimentWriter | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the files; it makes the run's folder when it is first asked for."""
        if self._experiment is None:
            self._experiment = ExperimentWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row.

        Args:
            metrics: Values by name: numbers, or tensors of one element.
            step: For the column "step".
        """
        writer = self.experiment
        writer.log_metrics(self._prefixed(metrics), step)
        flushes = ((len(writer.metrics) if step is None else step) + 1) // self._flush_logs_every_n_steps
        if flushes > self._flushes:
            self._flushes = flushes
            writer.save()

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace | None = None) -> None:
        """Add to `hparams.yaml`. What YAML has no type for is written as its name."""
        self.experiment.log_hparams(as_dict(params))

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged."""
        if self._experiment is not None:
            self._experiment.save()

    def position(self) -> dict[str, Any]:
        """The number of rows, and what file they are in."""
        self.save()
        return {"file": self.experiment.metrics_file_path, "rows": self.experiment.rows_written}

    def go_back(self, position: dict[str, Any]) -> None:
        """Drop the rows after `position`, if they are in this version's file; `metrics.csv.bak` keeps them."""
        if position["file"] == self.experiment.metrics_file_path:
            self.experiment.truncate(position["rows"])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what was logged."""
        self.save()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}
