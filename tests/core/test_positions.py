"""What loader workers draw at random depends on the seed, the epoch and a sample's place in it, and on nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.data import RankLoader

from .models import NumberData, assert_same_bits, quiet_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader", "ignore:This DataLoader will create")


class Noisy(Dataset[Tensor]):
    """Sample i is i and a random number of each kind."""

    def __init__(self, samples: int = 12) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(())), random.random(), float(np.random.rand())])


class AtOnce(Noisy):
    """The same, a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        assert isinstance(indices, (list, tuple))
        numbers = torch.tensor(indices)
        return list(torch.stack([numbers, torch.rand(len(numbers)), numbers, numbers], dim=1))


class Noting(pl.LightningModule):
    """Notes the rows that it is trained on, validated on and predicts, in a file per rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.layer = nn.Linear(4, 1)
        self.dropout: nn.Module = nn.Dropout(0.5)

    def note(self, word: str, batch: Tensor) -> None:
        with (self.folder / f"{word}-{self.global_rank}").open("a") as file:
            for row in batch.reshape(-1, 4).tolist():
                file.write(f"{self.current_epoch} {row}\n")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note("train", batch)
        return self.dropout(self.layer(batch / 10)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.note("val", batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(folder: Path, word: str) -> list[str]:
    return sorted(line for path in folder.glob(f"{word}-*") for line in path.read_text().splitlines())


def noted(folder: Path, ranks: int = 1, epochs: int = 2, **options: Any) -> tuple[list[str], list[str]]:
    """The rows of a fit on `ranks` ranks, by epoch and number."""
    folder.mkdir()
    torch.manual_seed(3)
    module = Noting(folder)
    module.dropout = nn.Identity()  # it would draw less on each of two ranks, and what is drawn later would be other
    trainer = quiet_trainer(folder, devices=ranks, max_epochs=epochs)
    batch_size = 4 // ranks
    trainer.fit(
        module, DataLoader(Noisy(), batch_size, shuffle=True, **options), DataLoader(Noisy(6), 2, num_workers=1)
    )
    return rows(folder, "train"), rows(folder, "val")


@pytest.mark.parametrize("persistent", [False, True])
def test_the_number_of_workers_and_of_ranks_changes_no_random_number(tmp_path: Path, persistent: bool) -> None:
    one = noted(tmp_path / "one", num_workers=1, persistent_workers=persistent)
    assert [len(set(part)) for part in one] == [24, 12]
    assert noted(tmp_path / "three", num_workers=3, persistent_workers=persistent) == one
    assert noted(tmp_path / "ranks", ranks=2, num_workers=2, persistent_workers=persistent) == one


@pytest.mark.parametrize("persistent", [False, True])
def test_each_epoch_has_its_own_random_numbers(tmp_path: Path, persistent: bool) -> None:
    trained, _ = noted(tmp_path / "run", num_workers=1, persistent_workers=persistent, epochs=3)
    drawn = [tuple(line.split("[")[1].strip("]").split(", ")[1:]) for line in trained]
    for kind in range(3):
        assert len({numbers[kind] for numbers in drawn}) == 36


def test_predictions_are_alike_on_any_number_of_workers_and_ranks(tmp_path: Path) -> None:
    def predicted(ranks: int, **options: Any) -> Tensor:
        torch.manual_seed(8)
        trainer = quiet_trainer(tmp_path, devices=ranks)
        return torch.cat(trainer.predict(Noting(tmp_path), DataLoader(Noisy(7), **options)))

    one = predicted(1, num_workers=1, batch_size=2)
    assert torch.equal(predicted(1, num_workers=2, batch_size=2), one)
    assert torch.equal(predicted(2, num_workers=1, batch_size=2), one)


@pytest.mark.parametrize("dataset", [Noisy(), AtOnce()])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": None},
        {"batch_sampler": [(0, 1), (2, 3, 4)]},
        {"batch_sampler": BatchSampler(SequentialSampler(range(12)), 5, drop_last=True)},
        {"sampler": RandomSampler(range(12), replacement=True), "batch_size": 3},
    ],
)
def test_every_kind_of_loader_loads_what_it_would_load_anyway(tmp_path: Path, dataset: Any, options: Any) -> None:
    def numbers(batches: Any) -> list[Any]:
        return [batch.reshape(-1, 4)[:, 0].tolist() for batch in batches]

    loader = DataLoader(dataset, num_workers=2, **options)
    torch.manual_seed(1)
    alone = numbers(loader)
    for training in (True, False):
        mine = RankLoader(loader, training=training)
        torch.manual_seed(1)
        assert numbers(mine.start()) == alone
        torch.manual_seed(1)
        assert numbers(mine.start(skip=1)) == alone[1:]


def collated(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples) + torch.rand(())


def test_what_collate_fn_draws_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    def batches(workers: int) -> list[Tensor]:
        torch.manual_seed(4)
        loader = DataLoader(NumberData(8), batch_size=2, collate_fn=collated, num_workers=workers)
        return list(RankLoader(loader, training=True).start())

    one = torch.stack(batches(1))
    assert torch.equal(torch.stack(batches(2)), one)
    assert len((one - torch.arange(8.0).view(4, 2)).unique()) >= 4


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("order", ["global", "own"])
def test_with_workers_the_order_and_the_model_are_those_of_the_plain_loop(
    tmp_path: Path, persistent: bool, order: str
) -> None:
    def make() -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(5) if order == "own" else None
        dataset = torch.arange(12.0).view(12, 1).expand(12, 4).contiguous()
        options: dict[str, Any] = {"num_workers": 2, "persistent_workers": persistent, "generator": generator}
        return DataLoader(dataset, batch_size=2, shuffle=True, **options)

    torch.manual_seed(7)
    module = Noting(tmp_path)
    quiet_trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(module, make())

    torch.manual_seed(7)
    by_hand = Noting(tmp_path)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    loader = make()
    for _ in range(3):
        for batch in loader:
            loss = by_hand.dropout(by_hand.layer(batch / 10)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_bits(weights(module), weights(by_hand))


@pytest.mark.parametrize("persistent", [False, True])
def test_a_run_resumed_anywhere_loads_the_same(tmp_path: Path, persistent: bool) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> Noting:
        folder.mkdir()
        torch.manual_seed(3 if ckpt_path is None else 4)
        module = Noting(folder)
        keeper = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(folder, max_epochs=3, callbacks=[keeper], enable_checkpointing=True)
        options: dict[str, Any] = {"num_workers": 2, "persistent_workers": persistent}
        loader = DataLoader(Noisy(), 4, shuffle=True, **options)
        trainer.fit(module, loader, DataLoader(Noisy(6), 2, **options), ckpt_path=ckpt_path)
        return module

    whole = run(tmp_path / "whole")
    trained, validated = (rows(tmp_path / "whole", word) for word in ("train", "val"))
    for step in (1, 3, 5, 6, 8):
        folder = tmp_path / f"from{step}"
        resumed = run(folder, tmp_path / f"whole/step={step}.ckpt")
        assert_same_bits(weights(resumed), weights(whole))
        assert set(rows(folder, "train")) < set(trained)
        assert len(rows(folder, "train")) == 4 * (9 - step)
        assert set(rows(folder, "val")) <= set(validated)


class Loaded(Dataset[int]):
    """Sample i is i; notes what it was asked for."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.asked_for: list[int] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        self.asked_for.append(index)
        return index


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "num_workers": 1}])
def test_the_place_of_batch_a_million_is_found_within_a_second(options: Any) -> None:
    dataset = Loaded(4_000_040)
    loader = DataLoader(dataset, batch_size=4, **options)

    def first(skip: int) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        mine = RankLoader(loader, training=True)
        began = time.process_time()  # others may have the machine for seconds
        batches: Iterator[Any] = mine.start(skip=skip)
        return next(batches), time.process_time() - began

    _, alone = first(1)
    batch, took = first(1_000_000)
    assert len(batch) == 4
    assert len(dataset.asked_for) <= 8
    assert took < alone + 1
    if not options:
        assert batch.tolist() == [4_000_000, 4_000_001, 4_000_002, 4_000_003]
