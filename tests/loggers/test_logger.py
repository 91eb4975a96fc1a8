from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import lightlite as pl
from lightlite import loggers
from lightlite.demos import BoringModel
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


class WritingLogger(ListLogger):
    """Keeps what happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[str] = []

    @property
    def experiment(self) -> Any:
        self.happened.append("begun")
        return self.rows

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.happened.append(f"row {step}")

    def save(self) -> None:
        self.happened.append("saved")


def test_a_run_begins_before_setup_and_is_saved_after_each_row(tmp_path: Path) -> None:
    class Logging(BoringModel):
        def setup(self, stage: str) -> None:
            logger.happened.append("set up")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("index", float(batch_idx))
            return super().training_step(batch, batch_idx)

    logger = WritingLogger()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=logger, max_steps=2, log_every_n_steps=1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Logging())

    assert logger.happened == ["begun", "set up", "saved", "row 0", "saved", "row 1", "saved", "saved"]
