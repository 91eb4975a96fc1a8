"""MLFlowLogger against the real client, on a folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from torch import Tensor, nn

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.errors import MisconfigurationException
from lightlite.loggers import MLFlowLogger


@pytest.fixture(autouse=True)
def _folders_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.5, net: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", float(batch_idx), on_step=True)
        self.log("score", -float(self.trainer.current_epoch), on_step=False, on_epoch=True)
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(logger: MLFlowLogger, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **arguments},
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(net={"width": 8, "act": "relu"}), [torch.ones(2, 2)] * 2)
    return trainer


def history(logger: MLFlowLogger, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(logger._tracking_uri)
    return [(entry.step, entry.value) for entry in client.get_metric_history(logger.run_id, name)]


def test_a_run_of_the_trainer_is_there_with_values_parameters_and_status(tmp_path: Path) -> None:
    logger = MLFlowLogger("try", run_name="first", tags={"who": "me"}, save_dir=str(tmp_path / "runs"), prefix="p")
    trainer = fit(logger, ModelCheckpoint(save_top_k=1))
    run = MlflowClient(f"file:{tmp_path}/runs").get_run(logger.run_id)
    assert history(logger, "p-loss") == [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]
    assert history(logger, "p-score") == [(1, 0.0), (3, -1.0)]
    assert run.data.params == {"lr": "0.5", "net/width": "8", "net/act": "relu"}
    assert (run.data.tags["who"], run.data.tags["mlflow.runName"], run.info.status) == ("me", "first", "FINISHED")
    assert (logger.name, logger.version) == (run.info.experiment_id, run.info.run_id)
    assert logger.save_dir == str(tmp_path / "runs")
    folder = tmp_path / "runs" / run.info.experiment_id / run.info.run_id / "checkpoints"
    assert trainer.checkpoint_callback is not None
    assert Path(trainer.checkpoint_callback.best_model_path).parent == folder  # type: ignore[attr-defined]


def test_two_ranks_log_to_one_run_and_know_its_id(tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=str(tmp_path))
    callback = ModelCheckpoint()
    fit(logger, callback, devices=2, max_epochs=1)
    client = MlflowClient(f"file:{tmp_path}")
    assert logger.experiment_id is not None
    assert [run.info.run_id for run in client.search_runs([logger.experiment_id])] == [logger.version]
    assert Path(callback.best_model_path).parts[-3] == logger.version


@pytest.mark.parametrize(("log_model", "kept"), [(True, 1), ("all", 2), (False, 0)])
def test_checkpoints_become_artifacts_with_aliases(tmp_path: Path, log_model: bool | str, kept: int) -> None:
    logger = MLFlowLogger(save_dir=str(tmp_path), log_model=log_model)
    callback = ModelCheckpoint(monitor="score", mode="min", save_top_k=1)
    fit(logger, callback)
    client = MlflowClient(f"file:{tmp_path}")
    names = [item.path for item in client.list_artifacts(logger.run_id)]
    assert names == ["epoch=0-step=2", "epoch=1-step=4"][2 - kept :]
    if kept:
        folder = Path(client.download_artifacts(logger.run_id, names[-1]))
        metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
        assert metadata["score"] == -1.0
        assert metadata["original_filename"] == "epoch=1-step=4.ckpt"
        assert (metadata["Checkpoint"]["monitor"], metadata["Checkpoint"]["save_top_k"]) == ("score", 1)
        assert (folder / "aliases.txt").read_text() == "['latest', 'best']"
        assert torch.load(folder / "epoch=1-step=4.ckpt", weights_only=True)["global_step"] == 4


def test_a_run_goes_on_under_its_id(tmp_path: Path) -> None:
    first = MLFlowLogger(save_dir=str(tmp_path))
    first.log_metrics({"a": 1.0}, step=1)
    first.finalize("failed")
    assert first.experiment.get_run(first.run_id).info.status == "FAILED"
    again = MLFlowLogger(save_dir=str(tmp_path), run_id=first.run_id)
    again.log_metrics({"a": torch.tensor(2.0)}, step=2)
    again.finalize("success")
    assert history(again, "a") == [(1, 1.0), (2, 2.0)]
    assert again.experiment_id == first.experiment_id
    assert again.experiment.get_run(first.run_id).info.status == "FINISHED"


def test_names_and_values_that_mlflow_does_not_take_are_told_of(tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"'acc@5' is logged as 'acc5'"):
        logger.log_metrics({"acc@5": 0.5}, step=0)
    with pytest.warns(UserWarning, match="leaves out word='text'"):
        logger.log_metrics({"word": "text", "a": 1.0}, step=0)
    logger.log_hyperparams({"long": "x" * 1000, **{f"p{index}": index for index in range(150)}})
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics == {"acc5": 0.5, "a": 1.0}
    assert len(run.data.params) == 151
    assert run.data.params["long"] == "x" * 250


def test_it_travels_to_another_process_without_its_client(tmp_path: Path) -> None:
    logger = MLFlowLogger(save_dir=str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=0)
    copy = pickle.loads(pickle.dumps(logger))
    assert (copy._client, copy.version) == (None, logger.version)


def test_a_wrong_log_model_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match=r"log_model='best'; give True, False or 'all'"):
        MLFlowLogger(log_model="best")
    monkeypatch.setattr("lightlite.loggers.logger.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mlflow-skinny"):
        MLFlowLogger()
