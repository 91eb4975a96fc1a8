"""A run goes on in the middle of an epoch on another number of ranks than it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint

from .models import NumberData, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader", "ignore:This DataLoader will create")
SAMPLES, GLOBAL_BATCH = 48, 12


class Noting(pl.LightningModule):
    """Notes the samples that it is trained on, by epoch, in a file per rank; logs their mean."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with (self.folder / f"samples-{self.global_rank}").open("a") as file:
            file.write("".join(f"{self.current_epoch} {batch_idx} {int(number)}\n" for number in batch))
        self.log("mean", batch.mean(), on_step=False, on_epoch=True, batch_size=len(batch))
        return self.layer(batch.unsqueeze(1) / SAMPLES).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(kind: str, ranks: int, workers: int) -> DataLoader[Any]:
    data, size = NumberData(SAMPLES), GLOBAL_BATCH // ranks
    if kind == "own generator":
        generator = torch.Generator().manual_seed(2)
        return DataLoader(data, size, shuffle=True, generator=generator, num_workers=workers)
    if kind == "batch sampler":
        sampler = BatchSampler(RandomSampler(data), size, drop_last=True)
        return DataLoader(data, batch_sampler=sampler, num_workers=workers)
    return DataLoader(data, size, shuffle=kind == "shuffled", num_workers=workers)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize(
    ("kind", "workers"), [("in order", 0), ("shuffled", 0), ("own generator", 0), ("batch sampler", 0), ("shuffled", 1)]
)
def test_no_sample_of_the_epoch_is_skipped_or_repeated(
    tmp_path: Path, before: int, after: int, kind: str, workers: int
) -> None:
    def noted(ranks: int, **options: Any) -> tuple[list[list[int]], pl.Trainer]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        torch.manual_seed(1)
        trainer = quiet_trainer(folder, devices=ranks, callbacks=[keeper], enable_checkpointing=True, max_epochs=2)
        trainer.fit(Noting(folder), loader(kind, ranks, workers), **options)
        lines = [
            [int(number) for number in line.split()]
            for path in folder.glob("samples-*")
            for line in path.read_text().splitlines()
        ]
        return lines, trainer

    whole, trainer = noted(before)
    began = [line for line in whole if line[:2] in ([0, 0], [0, 1])]
    went_on, other = noted(after, ckpt_path=tmp_path / "step=2.ckpt")
    for epoch in range(2):
        seen = sorted(number for place, _, number in [*began, *went_on] if place == epoch)
        assert seen == list(range(SAMPLES))
    assert sorted([*began, *went_on]) == sorted(whole)
    assert other.global_step == trainer.global_step == 8
    assert torch.equal(other.callback_metrics["mean"], trainer.callback_metrics["mean"])
