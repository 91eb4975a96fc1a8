from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightlite.loggers import TensorBoardLogger

pytest.importorskip("tensorboard")


def read(folder: str | Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    events = read(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_values_can_be_read_back_by_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="try", prefix="p")
    logger.log_metrics({"loss": 0.5, "acc": torch.tensor(0.25)}, step=3)
    logger.log_metrics({"loss": 0.125}, step=4)
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "try" / "version_0")
    assert scalars(logger.log_dir) == {"p-loss": [(3, 0.5), (4, 0.125)], "p-acc": [(3, 0.25)]}


def test_several_values_share_a_plot(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": {"train": 1.0, "val": 2.0}}, step=0)
    logger.finalize("success")
    assert scalars(Path(logger.log_dir) / "loss_train") == {"loss": [(0, 1.0)]}
    assert scalars(Path(logger.log_dir) / "loss_val") == {"loss": [(0, 2.0)]}


def test_hyperparameters_reach_the_table_and_the_yaml_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, sub_dir="sub", version="v")
    logger.log_hyperparams({"lr": 0.5, "net": {"act": nn.ReLU, "width": 8}})
    logger.save()
    folder = tmp_path / "lightning_logs" / "v" / "sub"
    content = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert content == {"lr": 0.5, "net": {"act": "torch.nn.modules.activation.ReLU", "width": 8}}
    assert scalars(folder) == {"hp_metric": [(0, -1.0)]}
    data = read(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"net/width" in data
    assert b"lr" in data
    logger.finalize("success")


def test_without_a_default_metric_only_given_metrics_are_recorded(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.5})
    logger.log_hyperparams({"lr": 0.5}, {"acc": 0.75}, step=2)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"acc": [(2, 0.75)]}


def test_the_graph_is_recorded_where_asked_for(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    net.example_input_array = torch.zeros(1, 4)  # type: ignore[assignment]
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    logger.log_graph(net)
    logger.finalize("success")
    assert read(logger.log_dir).Tags()["graph"] is True

    with pytest.warns(UserWarning, match="example_input_array"):
        logger.log_graph(nn.Linear(4, 2))


def test_what_cannot_be_plotted_is_refused_by_name(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(ValueError, match="word='text' of type str"):
        logger.log_metrics({"word": "text"}, step=0)
    logger.finalize("failed")


def test_a_logger_with_an_open_file_can_be_sent_to_another_process(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    copy = pickle.loads(pickle.dumps(logger))
    assert (copy.version, copy.log_dir) == (0, logger.log_dir)
    logger.finalize("success")


def test_logging_goes_on_after_the_run_was_finalized(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")
    logger.log_metrics({"a": 2.0}, step=1)
    logger.finalize("success")
    assert sorted(scalars(logger.log_dir)["a"]) == [(0, 1.0), (1, 2.0)]


def test_a_missing_tensorboard_is_said_with_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlite.loggers.logger.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)
