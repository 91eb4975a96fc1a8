"""Checkpoint files, resuming bit for bit, and building modules from files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite.callbacks import EarlyStopping, ModelCheckpoint

from .models import (
    FEATURES,
    TRAINING_ALONE,
    LearningRates,
    ListLogger,
    Net,
    assert_same_bits,
    quiet_trainer,
    regression_data,
    regression_loader,
    weights,
)

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE, "ignore:.*holds the state of callbacks")

EPOCHS = 4
BATCHES = 5


class RandomNet(pl.LightningModule):
    """Dropout, batch norm, Adam and a scheduler: a resumed run that forgets any of them ends elsewhere."""

    def __init__(self, width: int = 8, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        first, last = nn.Linear(FEATURES, width), nn.Linear(width, 1)
        self.net = nn.Sequential(first, nn.BatchNorm1d(width), nn.Dropout(0.4), last)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> tuple[Any, Any]:
    train = DataLoader(regression_data(2 * BATCHES), batch_size=2, shuffle=True)
    return train, DataLoader(regression_data(5), batch_size=2)


def run(folder: Path, ckpt_path: Any = None, seed: int = 3, **settings: Any) -> tuple[Any, RandomNet]:
    torch.manual_seed(seed)
    trainer = quiet_trainer(folder, **{"max_epochs": EPOCHS, "enable_checkpointing": True, **settings})
    module = RandomNet()
    trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trainer, module


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def test_the_file_has_lightnings_layout_and_loads_without_code(tmp_path: Path) -> None:
    _, module = run(tmp_path, max_epochs=1, callbacks=[every_epoch(tmp_path), EarlyStopping("val")])
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert checkpoint.keys() >= {
        "epoch",
        "global_step",
        "pytorch-lightning_version",
        "state_dict",
        "loops",
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
        "hparams_name",
        "hyper_parameters",
    }
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, BATCHES)
    assert checkpoint["hyper_parameters"] == {"width": 8, "lr": 0.02}
    assert_same_bits(checkpoint["state_dict"], weights(module))
    assert len(checkpoint["optimizer_states"]) == len(checkpoint["lr_schedulers"]) == 1
    assert checkpoint["optimizer_states"][0].keys() == {"state", "param_groups"}
    assert any(key.startswith("ModelCheckpoint") for key in checkpoint["callbacks"])
    assert any(key.startswith("EarlyStopping") for key in checkpoint["callbacks"])


def test_weights_only_checkpoints_hold_no_optimizer(tmp_path: Path) -> None:
    trainer, module = run(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert not checkpoint.keys() & {"optimizer_states", "lr_schedulers"}
    assert_same_bits(checkpoint["state_dict"], weights(module))


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_run_resumed_between_epochs_ends_bit_for_bit_like_the_uninterrupted_one(tmp_path: Path, epoch: int) -> None:
    trainer, whole = run(tmp_path, callbacks=[every_epoch(tmp_path)])
    resumed_trainer, resumed = run(tmp_path, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", seed=99)
    assert_same_bits(weights(resumed), weights(whole))
    assert (resumed_trainer.current_epoch, resumed_trainer.global_step) == (EPOCHS, EPOCHS * BATCHES)
    assert resumed_trainer.callback_metrics["val"] == trainer.callback_metrics["val"]


@pytest.mark.parametrize("step", [1, 4, 5, 6, 13, 19])
def test_a_run_resumed_at_any_step_ends_bit_for_bit_like_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    trainer, whole = run(tmp_path, callbacks=[every_step(tmp_path)])
    resumed_trainer, resumed = run(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", seed=99)
    assert_same_bits(weights(resumed), weights(whole))
    assert resumed_trainer.global_step == trainer.global_step == EPOCHS * BATCHES


def test_a_resumed_epoch_sees_the_batches_that_were_left_in_their_order(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.current_epoch, batch_idx, batch[0].sum().item()))

    run(tmp_path, max_epochs=2, callbacks=[every_step(tmp_path), Watch()])
    uninterrupted = list(seen)
    seen.clear()
    run(tmp_path, ckpt_path=tmp_path / "step=3.ckpt", seed=99, max_epochs=2, callbacks=[Watch()])
    assert seen == uninterrupted[3:]


def test_resuming_goes_on_with_hooks_where_it_was(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("start", trainer.current_epoch, trainer.global_step))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("validated", trainer.current_epoch, trainer.global_step))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("end", trainer.current_epoch, trainer.global_step))

    run(tmp_path, max_epochs=1, callbacks=[every_epoch(tmp_path)])
    run(tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2, callbacks=[Watch()])
    assert seen == [("start", 1, 5), ("validated", 1, 10), ("end", 1, 10)]


def test_learning_rates_go_on(tmp_path: Path) -> None:
    whole, resumed = LearningRates(), LearningRates()
    run(tmp_path, callbacks=[every_step(tmp_path), whole])
    run(tmp_path, ckpt_path=tmp_path / "step=7.ckpt", callbacks=[resumed])
    assert resumed.values == whole.values[7:]
    assert len(set(whole.values)) > 5


def test_gradients_accumulated_so_far_survive(tmp_path: Path) -> None:
    class SaveInWindow(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 2):
                assert all(parameter.grad is not None for parameter in pl_module.parameters())
                trainer.save_checkpoint(tmp_path / "window.ckpt")

    _, whole = run(tmp_path, callbacks=[SaveInWindow()], accumulate_grad_batches=2)
    _, resumed = run(tmp_path, ckpt_path=tmp_path / "window.ckpt", seed=99, accumulate_grad_batches=2)
    assert_same_bits(weights(resumed), weights(whole))


def test_callbacks_states_come_back(tmp_path: Path) -> None:
    class Remembers(pl.Callback):
        def __init__(self) -> None:
            self.count = 0
            self.loaded: Any = None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    first, second = Remembers(), Remembers()
    stop = [EarlyStopping("val", patience=50), EarlyStopping("val", patience=50)]
    keep = [ModelCheckpoint(dirpath=tmp_path, monitor="val", filename="{epoch}", save_top_k=-1) for _ in range(2)]
    run(tmp_path, max_epochs=2, callbacks=[first, stop[0], keep[0]])
    run(tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=2, callbacks=[second, stop[1], keep[1]])
    assert second.count == first.count == 2
    assert stop[1].best_score == stop[0].best_score
    assert stop[1].wait_count == stop[0].wait_count
    assert keep[1].best_model_path == keep[0].best_model_path
    assert keep[1].best_model_score == keep[0].best_model_score


def test_the_state_of_a_callback_that_is_not_there_is_not_lost_silently(tmp_path: Path) -> None:
    run(tmp_path, max_epochs=1, callbacks=[every_epoch(tmp_path)])
    with pytest.warns(UserWarning, match="ModelCheckpoint"):
        run(tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2, enable_checkpointing=False)


def test_hooks_add_to_a_checkpoint_and_take_from_it(tmp_path: Path) -> None:
    class Extra(RandomNet):
        taken: Any = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["extra"] = {"numbers": [1, 2], "tensor": torch.ones(2)}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.taken = checkpoint["extra"]["numbers"]

    trainer = quiet_trainer(tmp_path)
    trainer.fit(Extra(), *loaders())
    trainer.save_checkpoint(tmp_path / "extra.ckpt")
    module = Extra()
    quiet_trainer(tmp_path, max_epochs=2).fit(module, *loaders(), ckpt_path=tmp_path / "extra.ckpt")
    assert module.taken == [1, 2]
    assert Extra.load_from_checkpoint(tmp_path / "extra.ckpt").taken == [1, 2]


def test_a_datamodules_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        position = 0

        def train_dataloader(self) -> Any:
            return regression_loader(1)

        def state_dict(self) -> dict[str, Any]:
            return {"position": 7}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.position = state_dict["position"]

    trainer = quiet_trainer(tmp_path)
    trainer.fit(Net(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "data.ckpt")
    data = Data()
    quiet_trainer(tmp_path, max_epochs=2).fit(Net(), datamodule=data, ckpt_path=tmp_path / "data.ckpt")
    assert data.position == 7


def test_the_best_is_kept_and_the_others_are_removed(tmp_path: Path) -> None:
    class Scripted(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", [3.0, 1.0, 2.0, 4.0][self.current_epoch])

    callback = ModelCheckpoint(dirpath=tmp_path / "kept", monitor="val", save_top_k=2, filename="{epoch}-{val:.1f}")
    trainer = quiet_trainer(tmp_path, max_epochs=4, enable_checkpointing=True, callbacks=[callback])
    trainer.fit(Scripted(), regression_loader(1), regression_loader(1))
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert files == ["epoch=1-val=1.0.ckpt", "epoch=2-val=2.0.ckpt"]
    assert Path(callback.best_model_path).name == "epoch=1-val=1.0.ckpt"
    assert float(callback.best_model_score) == 1.0
    assert {Path(path).name: float(value) for path, value in callback.best_k_models.items()} == {
        "epoch=1-val=1.0.ckpt": 1.0,
        "epoch=2-val=2.0.ckpt": 2.0,
    }
    assert trainer.checkpoint_callback is callback


def test_checkpoints_are_written_by_default_with_epoch_and_step_in_their_name(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=True)
    trainer.fit(Net(), regression_loader(3))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch=1-step=6.ckpt"]
    assert Path(trainer.checkpoint_callback.best_model_path) == tmp_path / "checkpoints" / "epoch=1-step=6.ckpt"


def test_a_finished_fit_resumed_with_the_same_limit_does_nothing_more(tmp_path: Path) -> None:
    _, whole = run(tmp_path, callbacks=[every_epoch(tmp_path)])
    trainer, resumed = run(tmp_path, ckpt_path=tmp_path / f"epoch={EPOCHS - 1}.ckpt", seed=99)
    assert_same_bits(weights(resumed), weights(whole))
    assert trainer.global_step == EPOCHS * BATCHES


def test_load_from_checkpoint_builds_the_module_from_its_hyperparameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path)
    module = RandomNet(width=6, lr=0.5)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    loaded = RandomNet.load_from_checkpoint(tmp_path / "net.ckpt")
    assert dict(loaded.hparams) == {"width": 6, "lr": 0.5}
    assert_same_bits(weights(loaded), weights(module))
    assert RandomNet.load_from_checkpoint(tmp_path / "net.ckpt", lr=0.25).hparams.lr == 0.25
    assert RandomNet.load_from_checkpoint(str(tmp_path / "net.ckpt"), map_location="cpu").hparams.width == 6


def test_load_from_checkpoint_is_strict_unless_told_otherwise(tmp_path: Path) -> None:
    class Bigger(RandomNet):
        def __init__(self, width: int = 8, lr: float = 0.02) -> None:
            super().__init__(width, lr)
            self.more = nn.Linear(1, 1)

    trainer, module = run(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(RuntimeError, match=r"more\.weight"):
        Bigger.load_from_checkpoint(tmp_path / "net.ckpt")
    loaded = Bigger.load_from_checkpoint(tmp_path / "net.ckpt", strict=False)
    assert torch.equal(loaded.net[0].weight, module.net[0].weight)


def test_load_from_checkpoint_of_a_trained_module_predicts_the_same(tmp_path: Path) -> None:
    trainer, module = run(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    x = regression_data(4).tensors[0]
    loaded = RandomNet.load_from_checkpoint(tmp_path / "net.ckpt").eval()
    assert torch.equal(loaded.net(x), module.eval().net(x))


def test_hyperparameters_of_every_kind(tmp_path: Path) -> None:
    class Everything(Net):
        def __init__(self, a: int, b: str = "b", *, c: Any = None, loss: Any = None, **more: Any) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["loss"])

    hparams = Everything(1, c=[1, 2], loss=nn.MSELoss(), d=4.0).hparams
    assert dict(hparams) == {"a": 1, "b": "b", "c": [1, 2], "d": 4.0}
    assert hparams.c == hparams["c"] == [1, 2]

    class Chosen(Net):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.save_hyperparameters("a")

    assert dict(Chosen(1, 2).hparams) == {"a": 1}

    class FromObject(Net):
        def __init__(self, conf: Any) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    assert dict(FromObject({"x": 1}).hparams) == {"x": 1}
    assert dict(FromObject(Namespace(x=2)).hparams) == {"x": 2}


def test_hyperparameters_are_as_they_were_given_at_first(tmp_path: Path) -> None:
    class Changes(Net):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.hparams.width = 10

    module = Changes(3)
    assert module.hparams.width == 10
    assert module.hparams_initial.width == 3


def test_hyperparameters_reach_the_logger(tmp_path: Path) -> None:
    logger = ListLogger()
    quiet_trainer(tmp_path, logger=logger).fit(RandomNet(width=4), *loaders())
    assert [dict(given) for given in logger.hyperparameters] == [{"width": 4, "lr": 0.02}]


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    run(tmp_path, callbacks=[every_step(tmp_path / "kept")])
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".ckpt"}
