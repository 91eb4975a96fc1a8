from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

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
        torch.save((list(predictions), [list(indices) for indices in batch_indices]), "epoch.pt")


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
    assert indices == [[0, 1], [2, 3]]


def test_both_can_be_asked_for() -> None:
    trainer(Writer("batch_and_epoch")).predict(Net(), loader(1))
    assert sorted(path.name for path in Path().glob("*.pt")) == ["batch-0-0.pt", "epoch.pt"]


def test_a_writer_that_cannot_write_says_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="lacks write_on_batch_end"):
        trainer(BasePredictionWriter("batch")).predict(Net(), loader(1))


def test_another_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="write_interval='step'"):
        Writer("step")  # type: ignore[arg-type]
