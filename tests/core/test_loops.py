"""How long a fit runs, how many batches it takes, and when it validates."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import lightlite as pl
from lightlite.callbacks import EarlyStopping

from .models import TRAINING_ALONE, CountingNet, ListLogger, Net, NumberData, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


def fit(folder: Path, batches: int = 4, val_batches: int = 2, **settings: Any) -> tuple[CountingNet, Any]:
    module = CountingNet()
    trainer = quiet_trainer(folder, **settings)
    trainer.fit(module, regression_loader(batches), regression_loader(val_batches) if val_batches else None)
    return module, trainer


def batches(epochs: int, number: int) -> list[tuple[int, int]]:
    return [(epoch, index) for epoch in range(epochs) for index in range(number)]


class ValidationTimes(pl.Callback):
    """Before how many training batches of the whole fit each validation was."""

    def __init__(self) -> None:
        self.trained = 0
        self.times: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained += 1

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.times.append(self.trained)


def validation_times(folder: Path, loader: Any, **settings: Any) -> list[int]:
    times = ValidationTimes()
    quiet_trainer(folder, callbacks=[times], **settings).fit(CountingNet(), loader, regression_loader(1))
    return times.times


@pytest.mark.parametrize("epochs", [1, 3])
def test_max_epochs(tmp_path: Path, epochs: int) -> None:
    module, trainer = fit(tmp_path, max_epochs=epochs)
    assert module.trained == batches(epochs, 4)
    assert (trainer.current_epoch, trainer.global_step) == (epochs, 4 * epochs)


@pytest.mark.parametrize("limits", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}])
def test_nothing_to_train_leaves_everything_as_it_is(tmp_path: Path, limits: dict[str, Any]) -> None:
    module, trainer = fit(tmp_path, **limits)
    assert (module.trained, module.validated, trainer.global_step) == ([], [], 0)


@pytest.mark.parametrize(
    ("limits", "trained"),
    [
        ({"max_steps": 3, "max_epochs": None}, batches(1, 3)),
        ({"max_steps": 6, "max_epochs": None}, [*batches(1, 4), (1, 0), (1, 1)]),
        ({"max_steps": 6, "max_epochs": 1}, batches(1, 4)),
        ({"max_steps": -1, "max_epochs": 2}, batches(2, 4)),
        ({"max_steps": 3, "max_epochs": -1}, batches(1, 3)),
        ({"max_steps": 1, "max_epochs": None, "accumulate_grad_batches": 2}, batches(1, 2)),
    ],
)
def test_max_steps_and_max_epochs_whichever_comes_first(
    tmp_path: Path, limits: dict[str, Any], trained: list[tuple[int, int]]
) -> None:
    assert fit(tmp_path, **limits)[0].trained == trained


class StopAt(pl.Callback):
    """Asks to stop once batch `batch_idx` of epoch 0 is trained on."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, batches(1, 2)),
        ({"min_epochs": 1}, batches(1, 4)),
        ({"min_epochs": 2}, batches(2, 4)),
        ({"min_steps": 6}, [*batches(1, 4), (1, 0), (1, 1)]),
    ],
)
def test_should_stop_ends_the_fit_once_the_minima_are_reached(
    tmp_path: Path, settings: dict[str, Any], trained: list[tuple[int, int]]
) -> None:
    module, _ = fit(tmp_path, max_epochs=5, callbacks=[StopAt(1)], **settings)
    assert module.trained == trained


def test_a_fit_that_was_stopped_still_ends_its_epoch(tmp_path: Path) -> None:
    ended: list[str] = []

    class Ends(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            ended.append("epoch")

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            ended.append("train")

    fit(tmp_path, max_epochs=5, callbacks=[StopAt(1), Ends()])
    assert ended == ["epoch", "train"]


@pytest.mark.parametrize("limit", [{"seconds": 0.3}, timedelta(seconds=0.3), "00:00:00:01"])
def test_max_time(tmp_path: Path, limit: Any) -> None:
    class Slow(CountingNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.05)
            return super().training_step(batch, batch_idx)

    module = Slow()
    start = time.monotonic()
    quiet_trainer(tmp_path, max_epochs=-1, max_time=limit).fit(module, regression_loader(100))
    assert 0.2 < time.monotonic() - start < 5
    assert 4 <= len(module.trained) <= 60


def test_early_stopping(tmp_path: Path) -> None:
    class Worse(CountingNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(max(0, 3 - self.current_epoch) + 10 * (self.current_epoch > 2)))

    module, stopping = Worse(), EarlyStopping("val", patience=2)
    trainer = quiet_trainer(tmp_path, max_epochs=20, callbacks=[stopping])
    trainer.fit(module, regression_loader(1), regression_loader(1))
    assert trainer.current_epoch == 5
    assert stopping.stopped_epoch == 4
    assert float(stopping.best_score) == 1.0


@pytest.mark.parametrize(
    ("limit", "number"), [(1, 1), (3, 3), (100, 4), (0.5, 2), (1.0, 4), (0.74, 2), (0, 0), (0.0, 0), (None, 4)]
)
def test_limits_of_batches(tmp_path: Path, limit: Any, number: int) -> None:
    names = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
    trainer = quiet_trainer(tmp_path, **dict.fromkeys(names, limit))
    module, loader = CountingNet(), regression_loader(4)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    trainer.predict(module, loader)
    assert module.trained == batches(1, number)
    assert module.validated == (batches(1, number) if number else [])
    assert module.tested == module.predicted == list(range(number))


def test_limits_hold_for_each_of_several_loaders(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append((dataloader_idx, batch_idx))

    trainer = quiet_trainer(tmp_path, limit_val_batches=0.5)
    trainer.validate(Watching(), [regression_loader(2), regression_loader(6)], verbose=False)
    assert seen == [(0, 0), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("run", "number"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run(tmp_path: Path, run: Any, number: int) -> None:
    trainer = quiet_trainer(
        tmp_path, fast_dev_run=run, max_epochs=10, logger=True, enable_checkpointing=True, num_sanity_val_steps=2
    )
    module, loader = CountingNet(), regression_loader(4)
    trainer.fit(module, loader, loader)
    trainer.test(module, loader, verbose=False)
    assert module.trained == module.validated == batches(1, number)
    assert module.tested == list(range(number))
    assert trainer.global_step == number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("overfit", "number"), [(1, 1), (2, 2), (0.5, 2)])
def test_overfit_batches_trains_on_the_same_batches_every_epoch(tmp_path: Path, overfit: Any, number: int) -> None:
    seen: list[list[float]] = []

    class Watching(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch.tolist())
            return self.weight * 0.0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer(tmp_path, overfit_batches=overfit, max_epochs=3)
    trainer.fit(Watching(), DataLoader(NumberData(8), batch_size=2))
    assert seen == [[2.0 * index, 2.0 * index + 1] for index in range(number)] * 3


@pytest.mark.parametrize(("sanity", "number"), [(0, 0), (1, 1), (2, 2), (10, 3), (-1, 3)])
def test_sanity_validation(tmp_path: Path, sanity: int, number: int) -> None:
    module, trainer = fit(tmp_path, val_batches=3, num_sanity_val_steps=sanity, limit_train_batches=1, max_epochs=1)
    assert module.validated == [*batches(1, number), *batches(1, 3)]
    assert trainer.sanity_checking is False


def test_the_sanity_validation_knows_itself_and_does_not_reach_early_stopping(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(CountingNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.trainer.sanity_checking)
            self.log("val", 0.0 if self.trainer.sanity_checking else 1.0)

    stopping = EarlyStopping("val", patience=3)
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=1, callbacks=[stopping])
    trainer.fit(Watching(), regression_loader(1), regression_loader(2))
    assert seen == [True, False, False]
    assert float(stopping.best_score) == 1.0


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, [4, 8]),
        ({"val_check_interval": 1.0}, [4, 8]),
        ({"val_check_interval": 0.5}, [2, 4, 6, 8]),
        ({"val_check_interval": 0.25}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"val_check_interval": 3}, [3, 7]),
        ({"val_check_interval": 4}, [4, 8]),
        ({"val_check_interval": 1}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6]),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None}, [6]),
        ({"check_val_every_n_epoch": 2}, [8]),
        ({"check_val_every_n_epoch": 2, "val_check_interval": 0.5}, [6, 8]),
        ({"check_val_every_n_epoch": 3}, []),
        ({"limit_val_batches": 0}, []),
    ],
)
def test_validations_of_two_epochs_of_four_batches(tmp_path: Path, settings: dict[str, Any], times: list[int]) -> None:
    assert validation_times(tmp_path, regression_loader(4), max_epochs=2, **settings) == times


class EndlessData(IterableDataset[Any]):
    """Pairs (x, y) without end."""

    def __iter__(self) -> Any:
        while True:
            yield torch.ones(4), torch.ones(1)


class SixPairs(IterableDataset[Any]):
    """Six pairs; does not say how many."""

    def __iter__(self) -> Any:
        yield from ((torch.ones(4), torch.ones(1)) for _ in range(6))


def test_a_loader_without_length_is_trained_to_its_end_and_validated_after_it(tmp_path: Path) -> None:
    assert validation_times(tmp_path, DataLoader(SixPairs(), batch_size=2), max_epochs=2) == [3, 6]


def test_an_endless_loader_is_limited_by_steps(tmp_path: Path) -> None:
    loader = DataLoader(EndlessData(), batch_size=2)
    settings = {"max_steps": 7, "val_check_interval": 3, "check_val_every_n_epoch": None}
    assert validation_times(tmp_path, loader, max_epochs=None, **settings) == [3, 6]


def test_an_endless_loader_is_limited_by_batches(tmp_path: Path) -> None:
    loader = DataLoader(EndlessData(), batch_size=2)
    assert validation_times(tmp_path, loader, max_epochs=2, limit_train_batches=3) == [3, 6]


def test_accumulation_does_not_move_validation(tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 2}
    assert validation_times(tmp_path, regression_loader(4), max_epochs=1, **settings) == [2, 4]


def test_loaders_are_made_anew_every_n_epochs(tmp_path: Path) -> None:
    made: list[int] = []

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            made.append(self.trainer.current_epoch)
            return regression_loader(1)

    trainer = quiet_trainer(tmp_path, max_epochs=5, reload_dataloaders_every_n_epochs=2)
    trainer.fit(Net(), datamodule=Data())
    assert made == [0, 2, 4]


def test_the_samplers_epoch_is_set(tmp_path: Path) -> None:
    epochs: list[int] = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    data = regression_loader(1).dataset
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    trainer.fit(Net(), DataLoader(data, sampler=Sampler(data)))  # type: ignore[arg-type]
    assert epochs == [0, 1, 2]


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_training_step_returns_a_loss_or_a_dictionary_with_one(tmp_path: Path, form: str) -> None:
    outputs: list[Any] = []

    class Returns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return loss if form == "tensor" else {"loss": loss, "extra": batch_idx}

        def on_train_batch_end(self, outputs_: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(outputs_)

    module = Returns()
    before = module.layer.weight.detach().clone()
    quiet_trainer(tmp_path).fit(module, regression_loader(2))
    assert not torch.equal(module.layer.weight, before)
    assert outputs[0]["loss"].shape == ()
    assert [output.get("extra") for output in outputs] == ([None, None] if form == "tensor" else [0, 1])


def test_a_batch_whose_step_returns_none_is_skipped(tmp_path: Path) -> None:
    weights: list[torch.Tensor] = []

    class Skips(CountingNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            weights.append(self.layer.weight.detach().clone())

    module = Skips()
    quiet_trainer(tmp_path).fit(module, regression_loader(3))
    assert module.trained == batches(1, 3)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_minus_one_from_on_train_batch_start_skips_the_rest_of_the_epoch(tmp_path: Path) -> None:
    class Skips(CountingNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if self.current_epoch == 0 and batch_idx == 2 else None

    module = Skips()
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, regression_loader(4))
    assert module.trained == [(0, 0), (0, 1), *((1, index) for index in range(4))]
    assert trainer.global_step == 6


def test_several_training_loaders_come_as_one_batch(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    class Watching(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((sorted(batch), batch_idx))
            return self.loss(batch["a"]) + self.loss(batch["b"])

    loaders = {"a": regression_loader(2), "b": regression_loader(3)}
    quiet_trainer(tmp_path).fit(Watching(), loaders)
    assert seen == [(["a", "b"], 0), (["a", "b"], 1), (["a", "b"], 2)]


def test_the_trainer_says_how_many_batches_and_steps_there_will_be(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    class Watching(Net):
        def configure_optimizers(self) -> Any:
            seen.append((self.trainer.estimated_stepping_batches,))
            return super().configure_optimizers()

        def on_train_start(self) -> None:
            trainer = self.trainer
            seen.append((trainer.num_training_batches, trainer.num_val_batches, trainer.max_epochs))

    trainer = quiet_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Watching(), regression_loader(5), [regression_loader(2)])
    assert seen == [(9,), (5, [2], 3)]


def test_is_last_batch_and_training_flags(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Watching(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.trainer.training, self.trainer.validating, self.trainer.is_last_batch))
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path)
    trainer.fit(Watching(), regression_loader(2))
    assert seen == [(True, False, False), (True, False, True)]
    assert trainer.training is False


def test_keyboard_interrupt_reaches_the_script(tmp_path: Path) -> None:
    class Interrupts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(tmp_path).fit(Interrupts(), regression_loader(2))


def test_a_fit_can_follow_one_that_failed(tmp_path: Path) -> None:
    class FailsOnce(CountingNet):
        failed = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.failed and batch_idx == 1:
                self.failed = True
                raise ArithmeticError("once")
            return super().training_step(batch, batch_idx)

    module, logger = FailsOnce(), ListLogger()
    with pytest.raises(ArithmeticError, match="once"):
        quiet_trainer(tmp_path, logger=logger).fit(module, regression_loader(2))
    module.trained.clear()
    quiet_trainer(tmp_path).fit(module, regression_loader(2))
    assert module.trained == batches(1, 2)


@pytest.mark.parametrize("every", [1, 3, 4])
def test_nothing_that_is_due_is_passed_over_between_quiet_batches(tmp_path: Path, every: int) -> None:
    logged: list[int] = []
    validated: list[int] = []

    class Watched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            validated.append(self.trainer.global_step)

    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_steps=23, log_every_n_steps=every, val_check_interval=5)
    trainer.log_metrics = lambda metrics, step=None: logged.append(trainer.progress.batches_that_stepped)  # type: ignore[method-assign]
    trainer.fit(Watched(), regression_loader(10), regression_loader(1))
    assert trainer.global_step == 23
    steps = [step for step in range(23) if (step + 1) % every == 0]
    assert set(steps) <= set(logged)
    assert sorted(set(validated)) == [5, 10, 15, 20]
