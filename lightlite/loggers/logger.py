"""What the Trainer asks of every logger, and what the file-writing ones share."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from lightlite import distributed
from lightlite.utilities import files

if TYPE_CHECKING:
    from lightlite.callbacks.model_checkpoint import ModelCheckpoint

T = TypeVar("T")
PathLike = files.PathLike


class Logger(ABC):
    """Takes the values that a run logs.

    A subclass makes `experiment` with `@property` and `@rank_zero_experiment`, and marks what records with
    `@rank_zero_only`.
    """

    LOGGER_JOIN_CHAR = "-"
    """Stands between a prefix and a value's name."""
    saves_by_itself = False
    """Whether `log_metrics` sees to it that values reach the disk; otherwise the Trainer calls `save` after it."""
    _prefix = ""

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The experiment's name."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @property
    def save_dir(self) -> str | None:
        """The folder that all experiments' files go under; None for a logger that writes none."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The folder of the experiment: all its versions are in it."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run."""
        return None

    @property
    def experiment(self) -> Any:
        """The object of the library behind this logger."""
        return None

    @property
    def group_separator(self) -> str:
        """What stands between the parts of a value's name."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record values.

        Args:
            metrics: Values by name.
            step: The optimizer step they belong to.
        """

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record the run's hyper-parameters."""

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Record the model's graph, where the logger has a place for it."""

    def save(self) -> None:
        """Write to disk what was recorded."""

    def position(self) -> Any:
        """How far the log has come: plain data, for a checkpoint. None where a logger cannot go back.

        What was recorded is on disk by then.
        """
        return None

    def go_back(self, position: Any) -> None:
        """Forget what was recorded after `position`: the run goes on from a checkpoint of that moment."""

    def finalize(self, status: str) -> None:
        """The run has ended: "success", "failed" or "aborted"."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """A checkpoint callback has written a file."""

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        """Make what rank zero has decided known on all ranks. Called on every rank as a run begins.

        Args:
            broadcast: Returns rank zero's argument on every rank.
        """

    def _prefixed(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._prefix:
            return metrics
        return {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{key}": value for key, value in metrics.items()}


class VersionedLogger(Logger):
    """A logger that writes to `save_dir/name/version_N`.

    Without a version given, the next free number is taken, and its folder made, when it is first asked for on
    rank zero; runs started at the same moment get different numbers.
    """

    def __init__(self, save_dir: PathLike, name: str | None, version: int | str | None, prefix: str) -> None:
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = prefix

    @property
    def name(self) -> str:
        """The experiment's name; "" leaves its level of folders out."""
        return self._name

    @property
    def save_dir(self) -> str:
        """The folder that all experiments' files go under."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """`save_dir/name`."""
        return os.path.join(self.save_dir, self.name)

    @property
    def version(self) -> int | str:
        """A number, or the string that was given."""
        if self._version is None:
            self._version = self._take_next_version()
        return self._version

    @property
    def log_dir(self) -> str:
        """`root_dir/version_N`, or `root_dir/<version>` where the version is a string."""
        version = self.version
        return os.path.join(self.root_dir, version if isinstance(version, str) else f"version_{version}")

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        """Give all ranks rank zero's version."""
        self._version = broadcast(self.version if distributed.rank() == 0 else None)

    def _take_next_version(self) -> int:
        taken = [re.fullmatch(r"version_(\d+)", entry) for entry in files.names_in(self.root_dir)]
        version = max((int(match[1]) for match in taken if match), default=-1) + 1
        if distributed.rank() != 0:
            return version
        while True:
            try:
                files.make_folder(os.path.join(self.root_dir, f"version_{version}"), exist_ok=False)
                return version
            except FileExistsError:
                version += 1


class DummyExperiment:
    """Takes any call, attribute or index, and does nothing."""

    def nop(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nop

    def __getitem__(self, _index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, *_args: Any) -> None:
        pass


class DummyLogger(Logger):
    """A logger that records nothing, under any method's name; `fast_dev_run` puts it in the place of others."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def name(self) -> str:
        """An empty string."""
        return ""

    @property
    def version(self) -> str:
        """An empty string."""
        return ""

    @property
    def experiment(self) -> DummyExperiment:
        """An object that takes any call."""
        return self._experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return DummyExperiment().nop

    def __getitem__(self, _index: int) -> DummyLogger:
        return self

    def __iter__(self) -> Any:
        return iter(())


def rank_zero_experiment(fn: Callable[[Any], T]) -> Callable[[Any], T | DummyExperiment]:
    """Make a logger's `experiment` the real one on rank zero, and one that does nothing on the others."""

    @wraps(fn)
    def experiment(self: Any) -> T | DummyExperiment:
        return fn(self) if distributed.rank() == 0 else DummyExperiment()

    return experiment


def as_dict(params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
    """Hyper-parameters as a dictionary."""
    if params is None:
        return {}
    return dict(vars(params)) if isinstance(params, Namespace) else dict(params)


def as_number(value: Any) -> Any:
    """A tensor of one element as a Python number; anything else as it is."""
    return value.item() if isinstance(value, Tensor) else value


def plain(value: Any) -> Any:
    """`value` as nested dicts, lists, strings, numbers, booleans and None: what YAML holds without naming code."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, int) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def flat(params: Mapping[str, Any], separator: str = "/", above: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, the names of the levels joined."""
    result: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{above}{separator}{key}" if above else str(key)
        if isinstance(value, Namespace):
            value = vars(value)
        result.update(flat(value, separator, name) if isinstance(value, Mapping) and value else {name: value})
    return result


def write_hparams(path: str, params: Mapping[str, Any]) -> None:
    """Write hyper-parameters as YAML."""
    import yaml

    files.write_text(path, yaml.safe_dump(plain(params), default_flow_style=False))


def require(package: str, logger: str, to_install: str) -> None:
    """See that a logger's library is installed, without importing it.

    Raises:
        ModuleNotFoundError: Saying what to type.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{logger} needs the package {package}, which is not installed: `pip install {to_install}`, "
            "or use lightlite.loggers.CSVLogger, which needs nothing"
        )
