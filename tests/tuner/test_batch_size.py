"""The search for a batch size, on real errors of an allocator that has no memory left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TRAINING_ALONE, assert_same_bits, quiet_trainer, regression_data, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite.callbacks import BatchSizeFinder
from lightlite.errors import MisconfigurationException
from lightlite.tuner import Tuner

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Sized(pl.LightningModule):
    """Runs out of memory, in earnest, on batches above `most`."""

    def __init__(self, most: int = 10, samples: int = 64, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size, self.most, self.samples = batch_size, most, samples
        self.layer = nn.Linear(4, 1)
        self.sizes: list[int] = []

    def step(self, batch: Any) -> Tensor:
        x, y = batch
        self.sizes.append(len(x))
        if len(x) > self.most:
            torch.empty(len(x), 2**50)
        return nn.functional.mse_loss(self.layer(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(regression_data(self.samples), batch_size=self.batch_size, shuffle=True)

    def train_dataloader(self) -> Any:
        return self.loader()

    def test_dataloader(self) -> Any:
        return self.loader()

    def predict_dataloader(self) -> Any:
        return self.loader()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Validated(Sized):
    def val_dataloader(self) -> Any:
        return self.loader()


@pytest.mark.parametrize(
    ("options", "found", "tried"),
    [
        ({}, 8, [2, 4, 8, 16]),
        ({"mode": "binsearch", "margin": 0.0}, 10, [2, 4, 8, 16, 12, 10, 11]),
        ({"mode": "binsearch", "margin": 0.3}, 7, [2, 4, 8, 16, 12, 10, 11]),
        ({"init_val": 32}, 8, [32, 16, 8]),
        ({"max_trials": 2}, 4, [2, 4]),
        ({"max_val": 5}, 5, [2, 4, 5]),
    ],
)
def test_the_largest_size_that_fits_is_found(
    tmp_path: Path, options: dict[str, Any], found: int, tried: list[int]
) -> None:
    module, trainer = Sized(), quiet_trainer(tmp_path)
    before, random_state = weights(module), torch.get_rng_state()
    assert Tuner(trainer).scale_batch_size(module, steps_per_trial=2, **options) == found
    assert list(dict.fromkeys(module.sizes)) == tried
    assert module.batch_size == found
    assert_same_bits(weights(module), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (trainer.global_step, trainer.max_steps, trainer.limit_train_batches) == (0, -1, 1.0)


def test_a_batch_of_the_whole_data_is_enough(tmp_path: Path) -> None:
    module = Sized(most=10**6, samples=20)
    assert Tuner(quiet_trainer(tmp_path)).scale_batch_size(module) == 32
    assert max(module.sizes) == 20


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluations_find_a_size_too(tmp_path: Path, method: str) -> None:
    module = Validated()
    assert Tuner(quiet_trainer(tmp_path)).scale_batch_size(module, method=method) == 8
    assert module.batch_size == 8


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_the_callback_goes_on_with_what_it_found(tmp_path: Path, method: str) -> None:
    module, finder = Validated(), BatchSizeFinder()
    trainer = quiet_trainer(tmp_path, callbacks=[finder], limit_val_batches=8)
    getattr(trainer, method)(module)
    assert (finder.optimal_batch_size, module.batch_size) == (8, 8)
    assert module.sizes[-8:] == [8] * 8
    assert trainer.global_step == (8 if method == "fit" else 0)


def test_a_search_in_the_middle_of_a_fit_makes_the_loaders_anew(tmp_path: Path) -> None:
    class AtTheSecondEpoch(BatchSizeFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.scale_batch_size(trainer, pl_module)

    module = Sized()
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[AtTheSecondEpoch()])
    trainer.fit(module)
    assert trainer.global_step == 32 + 8 + 8
    assert module.sizes[-16:] == [8] * 16


def test_data_modules_may_keep_the_size(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(regression_data(64), batch_size=self.batch_size)

    module, data = Sized(), Data()
    del module.batch_size
    assert Tuner(quiet_trainer(tmp_path)).scale_batch_size(module, datamodule=data) == 8
    assert data.batch_size == 8


def test_other_errors_pass_through_and_leave_the_size(tmp_path: Path) -> None:
    class Failing(Sized):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("shapes do not match")

    module = Failing()
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Tuner(quiet_trainer(tmp_path)).scale_batch_size(module, init_val=4)
    assert module.batch_size == 2


def test_a_size_of_one_that_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="3 batches run out of memory even with batch_size=1"):
        Tuner(quiet_trainer(tmp_path)).scale_batch_size(Sized(most=0))


def test_wrong_use_names_what_is_allowed(tmp_path: Path) -> None:
    tuner = Tuner(quiet_trainer(tmp_path))
    with pytest.raises(ValueError, match="mode='double': allowed are 'power', 'binsearch'"):
        tuner.scale_batch_size(Sized(), mode="double")
    with pytest.raises(ValueError, match=r"method='train'\): allowed are 'fit', 'validate', 'test', 'predict'"):
        tuner.scale_batch_size(Sized(), method="train")
    with pytest.raises(MisconfigurationException, match=r"margin=1\.5; give a share from 0"):
        tuner.scale_batch_size(Sized(), margin=1.5)
    with pytest.raises(MisconfigurationException, match="init_val=0; give a number of at least 1"):
        tuner.scale_batch_size(Sized(), init_val=0)
    with pytest.raises(MisconfigurationException, match="Sized has no 'size', nor have its hparams or the data module"):
        tuner.scale_batch_size(Sized(), batch_arg_name="size")
    with pytest.raises(
        MisconfigurationException, match=r"the train loaders are made already; define train_dataloader\(\)"
    ):
        tuner.scale_batch_size(Sized(), Sized().loader())
    with pytest.raises(MisconfigurationException, match="cannot be searched for with 2 ranks"):
        Tuner(quiet_trainer(tmp_path, devices=2)).scale_batch_size(Sized())
    with pytest.raises(ValueError, match="has a BatchSizeFinder among its callbacks"):
        Tuner(quiet_trainer(tmp_path, callbacks=[BatchSizeFinder()])).scale_batch_size(Sized())


def test_several_evaluation_loaders_are_refused(tmp_path: Path) -> None:
    class Two(Sized):
        def test_dataloader(self) -> Any:
            return [self.loader(), self.loader()]

    with pytest.raises(MisconfigurationException, match=r"test_dataloader returned 2 loaders; .* with one"):
        Tuner(quiet_trainer(tmp_path)).scale_batch_size(Two(), method="test")


def test_a_size_kept_in_two_places_is_warned_of_and_set_in_both(tmp_path: Path) -> None:
    class Both(Sized):
        def __init__(self, batch_size: int = 2) -> None:
            super().__init__(batch_size=batch_size)
            self.save_hyperparameters()

    module = Both()
    with pytest.warns(UserWarning, match="both are set to the batch size that is found"):
        Tuner(quiet_trainer(tmp_path)).scale_batch_size(module)
    assert module.batch_size == module.hparams.batch_size == 8


def test_a_fast_dev_run_does_not_search(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="left out: fast_dev_run is on"):
        assert Tuner(quiet_trainer(tmp_path, fast_dev_run=True)).scale_batch_size(Sized()) is None
