from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

import lightlite as pl
from lightlite.callbacks import BasePredictionWriter
from lightlite.errors import MisconfigurationException

from .programs import Net, loader, trainer


class Writer(BasePredictionWriter):
    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        torch.save((prediction, list(batch_indices or ())), f"batch-{dataloader_idx}-{batch_idx}.pt")

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        torch.save((list(predictions), list(batch_indices)), "epoch.pt")


def written(name: str) -> Any:
    return torch.load(name, weights_only=True)


def test_each_batch_is_written_with_the_samples_it_holds() -> None:
    trainer(Writer("batch")).predict(Net(), loader(3), return_predictions=False)
    assert sorted(path.name for path in Path().glob("*.pt")) == ["batch-0-0.pt", "batch-0-1.pt", "batch-0-2.pt"]
    prediction, indices = written("batch-0-1.pt")
    assert (prediction.tolist(), indices) == (pytest.approx([0.2, 0.3]), [2, 3])


def test_all_batches_are_written_at_the_end() -> None:
    trainer(Writer("epoch")).predict(Net(), loader(2))
    predictions, indices = written("epoch.pt")
    assert [batch.tolist() for batch in predictions] == [pytest.approx([0, 0.1]), pytest.approx([0.2, 0.3])]
    assert indices == [[[0, 1], [2, 3]]]


def test_both_can_be_asked_for() -> None:
    trainer(Writer("batch_and_epoch")).predict(Net(), loader(1))
    assert sorted(path.name for path in Path().glob("*.pt")) == ["batch-0-0.pt", "epoch.pt"]


def test_a_writer_that_cannot_write_says_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="lacks write_on_batch_end"):
        trainer(BasePredictionWriter("batch")).predict(Net(), loader(1))


def test_another_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="write_interval='step'"):
        Writer("step")  # type: ignore[arg-type]


class Indices(Dataset[Tensor]):
    """Sample i is i."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int | list[int]) -> Tensor:
        return torch.tensor(index)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(11))


class Keep(pl.LightningModule):
    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return batch


class Notes(BasePredictionWriter):
    """Writes down what each rank is given: lines of (loader, batch, samples, indices), and what comes at the end."""

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        line = json.dumps([dataloader_idx, batch_idx, prediction.reshape(-1).tolist(), batch_indices])
        with Path(f"batches{trainer.global_rank}").open("a") as file:
            file.write(line + "\n")

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        several = isinstance(predictions[0], list) if predictions else False
        samples = [[p.reshape(-1).tolist() for p in part] for part in (predictions if several else [predictions])]
        Path(f"epoch{trainer.global_rank}").write_text(json.dumps([samples, batch_indices]))


def indexed_loaders(workers: int) -> list[Any]:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    data = Indices()
    return [
        DataLoader(data, batch_size=2, shuffle=True, **options),
        DataLoader(data, batch_size=3, sampler=[7, 7, 1, 4, 0, 2, 10], drop_last=True, **options),
        DataLoader(data, batch_sampler=[[5], [4, 3, 2, 1], [10, 0]], **options),
        DataLoader(data, batch_size=None, **options),
        DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 4, False), **options),
        DataLoader(Stream(), batch_size=4, num_workers=min(workers, 1)),
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 20, False), **options),
    ]


STREAM = 5
BATCHES = [6, 3, 3, 11, 3, 3, 1]


@pytest.mark.filterwarnings("ignore:.*worker")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_knows_the_samples_of_its_batches(ranks: int, workers: int) -> None:
    notes = trainer(Notes("batch_and_epoch"), devices=ranks)
    assert notes.predict(Keep(), indexed_loaders(workers), return_predictions=False) is None
    written: list[tuple[int, int]] = []
    for rank in range(ranks):
        lines = [json.loads(line) for line in Path(f"batches{rank}").read_text().splitlines()]
        for loader_idx, batch_idx, samples, indices in lines:
            assert indices == (None if loader_idx == STREAM else samples)
            assert batch_idx % ranks == rank
        written += [(loader_idx, batch_idx) for loader_idx, batch_idx, _, _ in lines]
        by_loader = [[line for line in lines if line[0] == loader_idx] for loader_idx in range(len(BATCHES))]
        samples, indices = ([[line[part] for line in lines] for lines in by_loader] for part in (2, 3))
        assert json.loads(Path(f"epoch{rank}").read_text()) == [samples, indices]
    assert sorted(written) == [(loader, batch) for loader, count in enumerate(BATCHES) for batch in range(count)]


@pytest.mark.parametrize(("interval", "files"), [("batch", ["batches0", "batches1"]), ("epoch", ["epoch0", "epoch1"])])
def test_every_rank_writes_when_it_was_asked_to(interval: Any, files: list[str]) -> None:
    predictions = trainer(Notes(interval), devices=2).predict(Keep(), indexed_loaders(0)[2])
    assert [batch.tolist() for batch in predictions] == [[5], [4, 3, 2, 1], [10, 0]]
    assert sorted(path.name for path in Path().glob("*[01]")) == files
    if interval == "epoch":
        first, second = (json.loads(Path(name).read_text()) for name in files)
        assert first == [[[[5], [10, 0]]], [[[5], [10, 0]]]]
        assert second == [[[[4, 3, 2, 1]]], [[[4, 3, 2, 1]]]]
