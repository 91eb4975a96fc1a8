"""What is logged by a run that was cut off and resumed is what the uninterrupted run logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.loggers import CSVLogger, Logger, TensorBoardLogger

from .models import Net, quiet_trainer, regression_loader

torchmetrics = pytest.importorskip("torchmetrics")


class Logging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanAbsoluteError()
        self.whole = torchmetrics.MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.error(self(batch[0]), batch[1])
        self.whole.update(self(batch[0]), batch[1])
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log("index", float(batch_idx), on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch))
        self.log("whole", self.whole.compute())
        self.whole.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def fit(folder: Path, devices: int = 1, logger: Logger | None = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(3)
    trainer = quiet_trainer(
        folder,
        devices=devices,
        max_epochs=3,
        log_every_n_steps=2,
        val_check_interval=3,
        logger=logger or CSVLogger(folder, name="", version="log"),
        enable_checkpointing=True,
        callbacks=[
            ModelCheckpoint(folder / "steps", every_n_train_steps=1, save_top_k=-1, filename="{step}"),
            ModelCheckpoint(folder / "epochs", save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True),
            ModelCheckpoint(
                folder / "val", monitor="val_loss", save_top_k=-1, filename="{step}", save_on_train_epoch_end=False
            ),
        ],
    )
    trainer.fit(Logging(), regression_loader(5, shuffle=True), regression_loader(2), **options)
    return trainer


@pytest.mark.parametrize(("devices", "every", "checkpoints"), [(1, 1, 15 + 3 + 3), (2, 4, 9 + 3 + 3)])
@pytest.mark.filterwarnings("ignore:the checkpoint folder")
def test_a_run_resumed_anywhere_ends_and_logs_as_the_whole_run(
    tmp_path: Path, devices: int, every: int, checkpoints: int
) -> None:
    whole = fit(tmp_path, devices)
    log = tmp_path / "log" / "metrics.csv"
    expected, values, weights = log.read_text(), dict(whole.callback_metrics), whole.lightning_module.state_dict()
    taken = [path for kind in ("steps", "epochs", "val") for path in (tmp_path / kind).glob("*.ckpt")]
    assert len(taken) == checkpoints

    for path in sorted(taken)[::every]:
        resumed = fit(tmp_path, devices, ckpt_path=path)
        assert log.read_text() == expected, path
        assert {key: value.item() for key, value in resumed.callback_metrics.items()} == {
            key: value.item() for key, value in values.items()
        }, path
        for name, weight in resumed.lightning_module.state_dict().items():
            assert torch.equal(weight, weights[name]), (path, name)


def test_what_was_logged_after_the_checkpoint_is_kept_beside_the_log(tmp_path: Path) -> None:
    fit(tmp_path)
    log = tmp_path / "log" / "metrics.csv"
    before = log.read_text()
    log.write_text(before.replace("2.0", "2.5"))
    fit(tmp_path, ckpt_path=tmp_path / "steps" / "step=3.ckpt")
    assert log.with_name("metrics.csv.bak").read_text() == before.replace("2.0", "2.5")


def test_a_log_elsewhere_is_left_alone(tmp_path: Path) -> None:
    fit(tmp_path)
    rows = (tmp_path / "log" / "metrics.csv").read_text()
    trainer = quiet_trainer(tmp_path, max_epochs=3, logger=CSVLogger(tmp_path, name="", version="other"))
    path = tmp_path / "steps" / "step=3.ckpt"
    with pytest.warns(UserWarning, match="state of callbacks"):
        trainer.fit(Logging(), regression_loader(5, shuffle=True), regression_loader(2), ckpt_path=path)
    assert (tmp_path / "log" / "metrics.csv").read_text() == rows
    assert torch.isfinite(trainer.callback_metrics["loss"])


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_a_resumed_run_as_the_whole_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def logger() -> TensorBoardLogger:
        return TensorBoardLogger(tmp_path, name="", version="board")

    fit(tmp_path, logger=logger())
    expected = tensorboard_scalars(tmp_path / "board")
    assert [step for step, _ in expected["loss_step"]] == [1, 3, 5, 7, 9, 11, 13]
    for path in ("steps/step=3.ckpt", "epochs/epoch=1.ckpt", "steps/step=14.ckpt", "steps/step=1.ckpt"):
        fit(tmp_path, logger=logger(), ckpt_path=tmp_path / path)
        assert tensorboard_scalars(tmp_path / "board") == expected, path


def test_what_tensorboard_showed_after_the_checkpoint_is_kept_under_a_name_it_does_not_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoardLogger(tmp_path, name="", version="board")
    first.log_metrics({"loss": 1.0, "pair": {"a": 1.0}}, step=1)
    position = first.position()
    first.log_metrics({"loss": 2.0, "pair": {"a": 2.0}}, step=2)
    first.finalize("failed")
    (whole,) = (tmp_path / "board").glob("events.*")
    content = whole.read_bytes()

    second = TensorBoardLogger(tmp_path, name="", version="board")
    second.log_metrics({"loss": 9.0}, step=9)
    second.go_back(position)
    assert tensorboard_scalars(tmp_path / "board") == {"loss": [(1, 1.0)]}
    assert tensorboard_scalars(tmp_path / "board" / "pair_a") == {"pair": [(1, 1.0)]}
    assert whole.with_name(whole.name.replace("tfevents", "bak")).read_bytes() == content
    other = TensorBoardLogger(tmp_path, name="", version="other")
    other.go_back(position)
    assert tensorboard_scalars(tmp_path / "board") == {"loss": [(1, 1.0)]}
