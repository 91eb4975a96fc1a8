from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from typing import Any

import pytest

from lightlite import loggers
from lightlite.loggers import DummyLogger, Logger
from lightlite.loggers.logger import DummyExperiment, rank_zero_experiment


class ListLogger(Logger):
    """The least a user's logger has to define."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> int:
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self.rows

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.rows.append(params)


def test_a_logger_needs_a_name_a_version_and_two_methods() -> None:
    logger = ListLogger()
    logger.finalize("success")
    assert (logger.save_dir, logger.root_dir, logger.log_dir, logger.group_separator) == (None, None, None, "/")
    with pytest.raises(TypeError, match="log_metrics"):
        Logger()  # type: ignore[abstract]


def test_the_experiment_is_real_on_rank_zero_only(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = ListLogger()
    assert logger.experiment is logger.rows
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert isinstance(logger.experiment, DummyExperiment)
    assert logger.experiment.add_image("a", 1) is None
    logger.experiment["x"]["y"] = 1


def test_the_dummy_takes_any_call_and_can_be_copied() -> None:
    for logger in (DummyLogger(), copy.deepcopy(DummyLogger()), pickle.loads(pickle.dumps(DummyLogger()))):
        logger.log_metrics({"a": 1}, step=0)
        logger.log_hyperparams({})
        logger.anything(1, key=2)
        assert logger.experiment.whatever() is None
        assert (logger.name, logger.version, logger.save_dir) == ("", "", None)


@pytest.mark.parametrize("name", ["CometLogger", "NeptuneLogger", "LitLogger"])
def test_a_logger_that_is_left_out_says_so(name: str) -> None:
    with pytest.raises(ImportError, match=f"there is no {name} in lightlite.loggers: .* left out of lightlite"):
        getattr(loggers, name)
    assert not hasattr(loggers, "CSVLoger")
