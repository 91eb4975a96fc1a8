"""Loaders and data modules as users bring them, and what may come between a loader's beginning and its first batch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint

from .models import NumberData, assert_same_bits, quiet_trainer, weights


class Drawing(pl.LightningModule):
    """Draws random numbers in the hooks before a first batch, and notes the batches it is given in a file per rank."""

    def __init__(self, folder: Path, noise: float = 0.5) -> None:
        super().__init__()
        self.folder = folder
        self.layer = nn.Linear(1, 1)
        self.noise = nn.Dropout(noise)
        self.trained: list[list[float]] = []

    def note(self, word: str, batch: Tensor) -> None:
        with (self.folder / f"{word}-{self.trainer.world_size}-{self.global_rank}").open("a") as file:
            file.write(f"{batch.tolist()}\n")

    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        torch.rand(2)

    def on_validation_start(self) -> None:
        torch.rand(5)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note("train", batch)
        self.trained.append(batch.tolist())
        return self.noise(self.layer(batch.unsqueeze(1) / 10)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.note("validate", batch)

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def noted(self, word: str, world: int) -> list[list[list[float]]]:
        files = [self.folder / f"{word}-{world}-{rank}" for rank in range(world)]
        return [[eval(line) for line in file.read_text().splitlines()] for file in files]


def numbers(samples: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(NumberData(samples), batch_size=batch_size, **options)


def test_random_numbers_drawn_in_hooks_shift_the_order_alike_on_one_rank_and_on_two(tmp_path: Path) -> None:
    for world in (1, 2):
        torch.manual_seed(5)
        module = Drawing(tmp_path, noise=0)
        trainer = quiet_trainer(tmp_path, devices=world, max_epochs=2)
        trainer.fit(module, numbers(8, 4 // world, shuffle=True), numbers(8, 2, shuffle=True))
    (alone,), together = module.noted("train", 1), module.noted("train", 2)
    assert [first + second for first, second in zip(*together, strict=True)] == alone
    (alone,), together = module.noted("validate", 1), module.noted("validate", 2)
    assert list(itertools.chain.from_iterable(zip(*together, strict=True))) == alone


def test_random_numbers_drawn_in_hooks_shift_the_order_as_in_the_plain_loop(tmp_path: Path) -> None:
    torch.manual_seed(5)
    module, loader = Drawing(tmp_path), numbers(8, 4, shuffle=True)
    with pytest.warns(UserWarning, match="no val loader"):
        quiet_trainer(tmp_path).fit(module, loader)
    torch.manual_seed(5)
    Drawing(tmp_path)
    batches = iter(loader)
    torch.rand(3)
    torch.rand(2)
    assert module.trained[0] == next(batches).tolist()


@pytest.mark.filterwarnings("ignore:.*no val loader")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_in_an_epoch_that_began_with_drawing_hooks_goes_on_bit_for_bit(
    tmp_path: Path, workers: int
) -> None:
    def run(seed: int, ckpt_path: Path | None = None) -> Drawing:
        torch.manual_seed(1)
        module = Drawing(tmp_path)
        torch.manual_seed(seed)
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[keeper], enable_checkpointing=True)
        trainer.fit(module, numbers(8, 2, shuffle=True, num_workers=workers), ckpt_path=ckpt_path)
        return module

    whole = run(seed=2)
    for step in (2, 5):
        resumed = run(seed=3, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.trained == whole.trained[step:]
        assert_same_bits(weights(resumed), weights(whole))


class Endless:
    """An iterable without an end, with a length."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(number)]) for number in itertools.count())


class EndlessData(IterableDataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(float(number)) for number in itertools.count())


class ShortLoader(DataLoader[Any]):
    def __len__(self) -> int:
        return 2


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Endless, [[0], [1], [2]]),
        (lambda: DataLoader(EndlessData(), batch_size=2), [[0, 1], [2, 3], [4, 5]]),
        (lambda: ShortLoader(NumberData(9), batch_size=2), [[0, 1], [2, 3]]),
    ],
    ids=["iterable", "stream", "subclass"],
)
def test_a_loader_is_evaluated_as_far_as_its_length(
    tmp_path: Path, world: int, make: Callable[[], Any], expected: list[Any]
) -> None:
    trainer = quiet_trainer(tmp_path, devices=world)
    predictions = trainer.predict(Drawing(tmp_path), make())
    assert [batch.tolist() for batch in predictions] == expected
    assert trainer.num_predict_batches == [len(expected)]


@pytest.mark.filterwarnings("ignore:.*no val loader")
@pytest.mark.parametrize(
    "sampler",
    [WeightedRandomSampler([1.0] * 8, 8), SubsetRandomSampler([5, 3, 7]), RandomSampler(range(8), True, 20)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_overfit_batches_takes_the_place_of_every_sampler_that_is_not_sequential(tmp_path: Path, sampler: Any) -> None:
    module = Drawing(tmp_path)
    with pytest.warns(UserWarning, match=f"and so not those of {type(sampler).__name__}; give a loader with shuffle="):
        quiet_trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(module, numbers(8, 2, sampler=sampler))
    assert module.trained == [[0, 1], [2, 3]] * 2


class ByEpoch(Sampler[int]):
    """Begins with the sample that has the epoch's number."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(self.epoch + number) % 4 for number in range(4)])

    def __len__(self) -> int:
        return 4


def test_the_epoch_of_evaluation_samplers_is_set(tmp_path: Path) -> None:
    module, loader = Drawing(tmp_path), numbers(4, 2, sampler=ByEpoch())
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, numbers(2, 2), loader)
    trainer.validate(module, loader, verbose=False)
    (seen,) = module.noted("validate", 1)
    assert seen == [[0, 1], [0, 1], [2, 3], [1, 2], [3, 0], [2, 3], [0, 1]]


@pytest.mark.parametrize("world", [1, 2])
def test_predictions_are_of_all_samples_where_the_loader_drops_its_last_batch(tmp_path: Path, world: int) -> None:
    class Own(BatchSampler):
        def __init__(self, samples: int) -> None:
            super().__init__(range(samples), 2, drop_last=True)

    loaders = [numbers(5, 2, drop_last=True), DataLoader(NumberData(5), batch_sampler=Own(5))]
    predictions = quiet_trainer(tmp_path, devices=world).predict(Drawing(tmp_path), loaders)
    assert [[batch.tolist() for batch in part] for part in predictions] == [[[0, 1], [2, 3], [4]]] * 2
    assert [len(loader) for loader in loaders] == [2, 2]


def test_overfit_batches_is_about_fit(tmp_path: Path) -> None:
    module = Drawing(tmp_path)
    trainer = quiet_trainer(tmp_path, overfit_batches=1)
    trainer.validate(module, numbers(8, 2, sampler=SubsetRandomSampler([5, 5, 5, 5])), verbose=False)
    assert module.noted("validate", 1) == [[[5, 5]]]


def test_no_loader_is_asked_for_where_no_batch_is_wanted(tmp_path: Path) -> None:
    class Nothing(Drawing):
        def predict_dataloader(self) -> Any:
            raise AssertionError

    trainer = quiet_trainer(tmp_path, limit_predict_batches=0)
    assert trainer.predict(Nothing(tmp_path)) is None
    assert trainer.num_predict_batches == []


class SizedData(pl.LightningDataModule):
    def __init__(self, batch_size: int, folder: str = "data") -> None:
        super().__init__()
        self.batch_size, self.folder = batch_size, folder
        self.name = "sizes"


def test_a_datamodule_of_datasets_knows_its_batch_size_and_keeps_nests() -> None:
    nest = {"a": NumberData(3), "b": [NumberData(4), NumberData(5)]}
    datamodule = SizedData.from_datasets(nest, EndlessData(), (NumberData(1),), batch_size=3, folder="x")
    assert (datamodule.batch_size, datamodule.folder, datamodule.name) == (3, "x", "sizes")
    train = datamodule.train_dataloader()
    assert [len(train["a"].dataset), len(train["b"][1].dataset), train["b"][1].batch_size] == [3, 5, 3]
    assert isinstance(train["b"][0].sampler, RandomSampler)
    assert isinstance(datamodule.val_dataloader().dataset, EndlessData)
    (test,) = datamodule.test_dataloader()
    assert not isinstance(test.sampler, RandomSampler)

    class Anything(pl.LightningDataModule):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.given = given

    assert Anything.from_datasets(batch_size=7, extra=1).given == {"batch_size": 7, "num_workers": 0, "extra": 1}


def test_a_datamodule_shows_the_sizes_of_its_datasets() -> None:
    datamodule = pl.LightningDataModule.from_datasets(NumberData(3), [NumberData(4), NumberData(5)], EndlessData())
    assert str(datamodule).split(os.linesep) == [
        "{Train dataloader: size=3}",
        "{Validation dataloader: 1. size=4 ; 2. size=5}",
        "{Test dataloader: size=6}",
        "{Predict dataloader: None}",
    ]
