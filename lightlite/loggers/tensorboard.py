"""TensorBoard, by PyTorch's own writer."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightlite.loggers.events import EventFiles
from lightlite.loggers.logger import (
    PathLike,
    VersionedLogger,
    as_dict,
    as_number,
    flat,
    plain,
    rank_zero_experiment,
    require,
    write_hparams,
)
from lightlite.utilities import files
from lightlite.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(VersionedLogger):
    """Logs to `save_dir/name/version_N` for TensorBoard, hyper-parameters and graph included.

    Args:
        save_dir: The folder for all experiments.
        name: The experiment's; "" or None for no folder of its own.
        version: A number, or a string that becomes the folder's name; None for the next free number.
        log_graph: Whether to record the model's graph; the module needs `example_input_array`.
        default_hp_metric: Whether a run shows up in the table of hyper-parameters (by the value `hp_metric`, -1)
            before a metric was logged with its hyper-parameters.
        prefix: Put before every value's name, with a "-".
        sub_dir: A folder below `version_N` to write to.
        kwargs: More arguments of `torch.utils.tensorboard.SummaryWriter`, such as `flush_secs`.

    Raises:
        ModuleNotFoundError: Where tensorboard is not installed.
    """

    NAME_HPARAMS_FILE = "hparams.yaml"
    saves_by_itself = True

    def __init__(
        self,
        save_dir: PathLike,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        require("tensorboard", "TensorBoardLogger", "tensorboard")
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._writer_arguments = kwargs
        self._experiment: SummaryWriter | None = None
        self._events: EventFiles | None = None
        self.hparams: dict[str, Any] = {}

    @property
    def sub_dir(self) -> str | None:
        """The folder below `version_N`."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        """The folder of this run, `sub_dir` included."""
        folder = os.path.join(super().log_dir, self._sub_dir) if self._sub_dir else super().log_dir
        return os.path.expanduser(os.path.expandvars(folder))

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """PyTorch's `SummaryWriter`, made when it is first asked for."""
        if self._experiment is None:
            from torch.utils.tensorboard import SummaryWriter

            files.make_folder(self.root_dir)
            self._experiment = SummaryWriter(log_dir=self.log_dir, **self._writer_arguments)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values.

        Args:
            metrics: By name: a number, a tensor of one element, or a dictionary of them for one common plot.
            step: The optimizer step.

        Raises:
            ValueError: For a value of another kind.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for name, value in self._prefixed(metrics).items():
            if isinstance(value, Mapping):
                self.experiment.add_scalars(name, {key: as_number(item) for key, item in value.items()}, step)
                continue
            try:
                values.append(Summary.Value(tag=name, simple_value=float(as_number(value))))
            except Exception as error:
                raise ValueError(
                    f"cannot log {name}={value!r} of type {type(value).__name__}: TensorBoardLogger.log_metrics takes "
                    "numbers, tensors of one element, and dictionaries of them; use logger.experiment for the rest"
                ) from error
        if values:  # as one event, for each costs the writer's thread a checksum in Python
            self._file_writer().add_summary(Summary(value=values), step)

    def _file_writer(self) -> Any:
        """What `experiment` writes events with; another one where somebody has closed it."""
        return self.experiment._get_file_writer()

    @rank_zero_only
    def log_hyperparams(
        self,
        params: Mapping[str, Any] | Namespace,
        metrics: Mapping[str, Any] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Record hyper-parameters, for `hparams.yaml` and for TensorBoard's table.

        Args:
            params: Nested dictionaries are shown as "outer/inner".
            metrics: Values to show beside them; a number is the value of `hp_metric`.
            step: The step of those values, 0 by default.
        """
        given = as_dict(params)
        self.hparams.update(given)
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        from torch.utils.tensorboard.summary import hparams

        self.log_metrics(metrics, 0 if step is None else step)
        shown = {name: _showable(value) for name, value in flat(given).items()}
        for part in hparams(shown, dict(metrics)):
            self._file_writer().add_summary(part)

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Record the model's graph, where `log_graph=True` asked for it.

        Args:
            model: The module.
            input_array: What to trace it with; the module's `example_input_array` by default.
        """
        if not self._log_graph:
            return
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if example is None:
            rank_zero_warn("log_graph=True records nothing: the module has no `example_input_array` to trace it with")
            return
        device = next((parameter.device for parameter in model.parameters()), None)
        if isinstance(example, Tensor) and device is not None:
            example = example.to(device)
        with warnings.catch_warnings():
            # PyTorch's writer traces by torch.jit, which PyTorch has deprecated.
            warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
            self.experiment.add_graph(model, example)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged, and `hparams.yaml` where there is none yet."""
        if self._experiment is not None:
            self._experiment.flush()
        path = os.path.join(self.log_dir, self.NAME_HPARAMS_FILE)
        if self.hparams and not files.exists(path):
            files.make_folder(self.log_dir)
            write_hparams(path, self.hparams)

    def position(self) -> dict[str, Any] | None:
        """The folder, and how many events are in it; None where it is a remote one."""
        if files.is_remote(self.log_dir):
            return None
        self.save()
        return {"folder": self.log_dir, "events": self._event_files().count()}

    def go_back(self, position: dict[str, Any]) -> None:
        """Drop the events after `position`, if it is one of this version's folder; see `EventFiles.cut`."""
        if position["folder"] != self.log_dir:
            return
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None
        self._event_files().cut(position["events"])

    def _event_files(self) -> EventFiles:
        if self._events is None:
            self._events = EventFiles(self.log_dir)
        return self._events

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what was logged, and close the file; a later value opens another."""
        if self._experiment is None and not self.hparams:
            return
        self.save()
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


def _showable(value: Any) -> bool | int | float | str:
    value = plain(value)
    return value if isinstance(value, (bool, int, float, str)) else str(value)
