"""validate, test and predict: modes, results, and which weights they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint

from .models import (
    TRAINING_ALONE,
    CountingNet,
    ManyLoadersNet,
    Net,
    NumberData,
    quiet_trainer,
    regression_data,
    regression_loader,
)

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class ModeNet(Net):
    """A net with a frozen part in evaluation mode; `seen` holds (own mode, part's mode, gradients on)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
        self.part.eval()
        self.seen: dict[str, set[tuple[bool, ...]]] = {}
        self.inference: dict[str, bool] = {}

    def look(self, where: str) -> None:
        state = (self.training, self.part.training, torch.is_grad_enabled())
        self.inference[where] = torch.is_inference_mode_enabled()
        self.seen.setdefault(where, set()).add(state)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.look("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.look("validation")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.look("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.look("predict")

    def on_validation_epoch_end(self) -> None:
        self.look("validation end")

    def on_train_epoch_end(self) -> None:
        self.look("train end")


def test_modes_inside_and_after(tmp_path: Path) -> None:
    module, loader = ModeNet(), regression_loader(2)
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    trainer.predict(module, loader)
    inside = {(False, False, False)}
    outside = {(True, False, True)}
    assert module.seen == {
        "train": outside,
        "train end": outside,
        "validation": inside,
        "validation end": inside,
        "test": inside,
        "predict": inside,
    }
    assert (module.training, module.part.training, module.layer.training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_evaluation_alone_puts_the_modes_back(tmp_path: Path) -> None:
    module = ModeNet()
    module.layer.eval()
    for entry_point in ("validate", "test"):
        getattr(quiet_trainer(tmp_path), entry_point)(module, regression_loader(1), verbose=False)
    assert (module.training, module.part.training, module.layer.training) == (True, False, False)


def test_modes_and_gradients_come_back_after_an_exception(tmp_path: Path) -> None:
    class Fails(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        quiet_trainer(tmp_path).validate(Fails(), regression_loader(1), verbose=False)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_evaluation_alone_runs_in_inference_mode(tmp_path: Path) -> None:
    module, trainer = ModeNet(), quiet_trainer(tmp_path)
    trainer.validate(module, regression_loader(1), verbose=False)
    trainer.test(module, regression_loader(1), verbose=False)
    trainer.predict(module, regression_loader(1))
    assert module.inference == {"validation": True, "validation end": True, "test": True, "predict": True}


def test_inference_mode_can_be_switched_off(tmp_path: Path) -> None:
    module = ModeNet()
    quiet_trainer(tmp_path, inference_mode=False).validate(module, regression_loader(1), verbose=False)
    assert module.seen["validation"] == {(False, False, False)}
    assert module.inference["validation"] is False


def test_gradients_may_be_enabled_in_a_test_step(tmp_path: Path) -> None:
    slopes: list[Tensor] = []

    class Slopes(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_(True)
                self(x).sum().backward()
                slopes.append(x.grad)

    module = Slopes()
    quiet_trainer(tmp_path, inference_mode=False).test(module, regression_loader(1), verbose=False)
    torch.testing.assert_close(slopes[0], module.layer.weight.detach().expand(2, 4))


@pytest.mark.parametrize("entry_point", ["validate", "test"])
def test_results_are_a_list_of_a_dictionary_per_loader(tmp_path: Path, entry_point: str) -> None:
    trainer = quiet_trainer(tmp_path)
    run = getattr(trainer, entry_point)
    assert run(Net(), regression_loader(1), verbose=False) == [{}]
    assert run(ManyLoadersNet(), [regression_loader(1), regression_loader(1)], verbose=False) == [{}, {}]


@pytest.mark.parametrize("entry_point", ["validate", "test"])
def test_verbose_results_are_printed_as_a_table(tmp_path: Path, entry_point: str, capsys: Any) -> None:
    class Logs(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("accuracy", 0.875)

        test_step = validation_step

    getattr(quiet_trainer(tmp_path), entry_point)(Logs(), regression_loader(1))
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "0.875" in printed


def test_predictions_are_a_list_of_batches_in_order(tmp_path: Path) -> None:
    module = Net()
    predictions = quiet_trainer(tmp_path).predict(module, DataLoader(regression_data(5), batch_size=2))
    assert [tuple(batch.shape) for batch in predictions] == [(2, 1), (2, 1), (1, 1)]
    torch.testing.assert_close(torch.cat(predictions), module(regression_data(5).tensors[0]).detach())


def test_predictions_of_several_loaders_are_a_list_of_lists(tmp_path: Path) -> None:
    class Where(ManyLoadersNet):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return dataloader_idx, batch_idx

    predictions = quiet_trainer(tmp_path).predict(Where(), [regression_loader(2), regression_loader(1)])
    assert predictions == [[(0, 0), (0, 1)], [(1, 0)]]


def test_predictions_are_not_kept_when_not_wanted(tmp_path: Path) -> None:
    assert not quiet_trainer(tmp_path).predict(Net(), regression_loader(2), return_predictions=False)


def test_predict_without_predict_step_is_forward(tmp_path: Path) -> None:
    class OnlyForward(pl.LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    predictions = quiet_trainer(tmp_path).predict(OnlyForward(), DataLoader(NumberData(3), batch_size=2))
    assert [batch.tolist() for batch in predictions] == [[0.0, 2.0], [4.0]]


def test_any_output_of_predict_step_comes_back(tmp_path: Path) -> None:
    class Strange(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"text": "a" * batch_idx, "nest": [(batch_idx, None)]}

    assert quiet_trainer(tmp_path).predict(Strange(), regression_loader(2)) == [
        {"text": "", "nest": [(0, None)]},
        {"text": "a", "nest": [(1, None)]},
    ]


class Improving(Net):
    """Its `val` is best (lowest) in epoch 1; `mark` is the epoch in which the weights were saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mark", torch.tensor(-1.0))

    def on_train_batch_end(self, *_: Any) -> None:
        self.mark.fill_(self.current_epoch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", abs(self.current_epoch - 1.0))
        self.log("mark", self.mark)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mark", self.mark)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return float(self.mark)


def fitted(folder: Path, **checkpointing: Any) -> tuple[Any, Improving]:
    checkpoint = ModelCheckpoint(**{"dirpath": folder, "monitor": "val", "save_last": True, **checkpointing})
    trainer = quiet_trainer(folder, max_epochs=4, enable_checkpointing=True, callbacks=[checkpoint])
    module = Improving()
    trainer.fit(module, regression_loader(1), regression_loader(1))
    assert float(module.mark) == 3.0
    return trainer, module


def marks(trainer: Any, *args: Any, **kwargs: Any) -> list[float]:
    loader = regression_loader(1)
    return [
        trainer.validate(*args, dataloaders=loader, verbose=False, **kwargs)[0]["mark"],
        trainer.test(*args, dataloaders=loader, verbose=False, **kwargs)[0]["mark"],
        trainer.predict(*args, dataloaders=loader, **kwargs)[0],
    ]


def test_without_a_model_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    trainer, module = fitted(tmp_path)
    assert marks(trainer) == [1.0, 1.0, 1.0]
    assert float(module.mark) == 1.0


def test_with_a_model_its_own_weights_are_used(tmp_path: Path) -> None:
    trainer, module = fitted(tmp_path)
    assert marks(trainer, module) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(("which", "mark"), [("best", 1.0), ("last", 3.0), ("path", 1.0)])
def test_a_checkpoint_is_chosen_by_name_or_path(tmp_path: Path, which: str, mark: float) -> None:
    trainer, module = fitted(tmp_path)
    ckpt_path = trainer.checkpoint_callback.best_model_path if which == "path" else which
    assert marks(trainer, module, ckpt_path=ckpt_path) == [mark] * 3


def test_best_where_nothing_was_saved_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Net(), regression_loader(1))
    with pytest.raises(Exception, match="best") as caught:
        trainer.test(dataloaders=regression_loader(1), ckpt_path="best", verbose=False)
    assert type(caught.value).__name__ in {"ValueError", "MisconfigurationException", "CheckpointNotFoundError"}


def test_without_a_model_and_without_a_fit_before_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    for entry_point in ("validate", "test", "predict"):
        with pytest.raises(Exception, match=r"(?i)model|module"):
            getattr(quiet_trainer(tmp_path), entry_point)(dataloaders=regression_loader(1))


def test_evaluation_does_not_change_the_counters_or_the_weights(tmp_path: Path) -> None:
    module = Net()
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, regression_loader(2))
    before = module.layer.weight.detach().clone()
    marks_before = (trainer.current_epoch, trainer.global_step)
    trainer.validate(module, regression_loader(3), verbose=False)
    trainer.predict(module, regression_loader(3))
    assert (trainer.current_epoch, trainer.global_step) == marks_before == (2, 4)
    assert torch.equal(module.layer.weight, before)


def test_the_loaders_of_the_module_are_used_where_none_are_given(tmp_path: Path) -> None:
    class WithLoaders(CountingNet):
        def train_dataloader(self) -> Any:
            return regression_loader(1)

        def val_dataloader(self) -> Any:
            return regression_loader(2)

        def test_dataloader(self) -> Any:
            return regression_loader(3)

        def predict_dataloader(self) -> Any:
            return regression_loader(4)

    module = WithLoaders()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    trainer.predict(module)
    assert [len(seen) for seen in (module.trained, module.validated, module.tested, module.predicted)] == [1, 2, 3, 4]


def test_a_datamodule_knows_its_trainer_and_keeps_its_hyperparameters(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Data(pl.LightningDataModule):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.save_hyperparameters()

        def setup(self, stage: str) -> None:
            seen.append((stage, self.trainer is trainer))

        def predict_dataloader(self) -> Any:
            return regression_loader(self.hparams.size)

    trainer = quiet_trainer(tmp_path)
    data = Data(size=3)
    assert len(trainer.predict(Net(), datamodule=data)) == 3
    assert trainer.datamodule is data
    assert seen == [("predict", True)]


def test_the_module_is_without_a_trainer_before_and_with_it_afterwards(tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(RuntimeError, match="Trainer"):
        _ = module.trainer
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, regression_loader(1))
    assert module.trainer is trainer
    assert trainer.model is module
    assert trainer.lightning_module is module


def test_an_evaluation_within_fit_is_limited_to_its_loop(tmp_path: Path) -> None:
    class BatchNorm(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    module = BatchNorm()
    trainer = quiet_trainer(tmp_path)
    trainer.validate(module, regression_loader(2), verbose=False)
    assert int(module.norm.num_batches_tracked) == 0
    trainer.fit(module, regression_loader(2), regression_loader(3))
    assert int(module.norm.num_batches_tracked) == 2
