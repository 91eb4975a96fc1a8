"""A fit goes on from a checkpoint that was taken in any hook outside of a step, and ends and logs as the whole one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightlite as pl
from lightlite.callbacks import Checkpoint, EarlyStopping, StochasticWeightAveraging
from lightlite.loggers import CSVLogger

from .models import FEATURES, assert_same_bits, quiet_trainer, weights

torchmetrics = pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.filterwarnings(
    "ignore:StochasticWeightAveraging steps", "ignore:an epoch has", "ignore:.*state of callbacks", "ignore:'set_vital'"
)
HOOKS = (
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)


def noisy(index: int) -> Tensor:
    numbers = torch.arange(FEATURES) / 10 + index
    return numbers + 0.1 * torch.randn(FEATURES) + 0.1 * random.random()


class Noisy(Dataset[Tensor]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return noisy(index)


class NoisyStream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return map(noisy, range(6))


class SizedStream(NoisyStream):
    def __len__(self) -> int:
        return 6


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.3), nn.Linear(FEATURES, 1))
        self.error = torchmetrics.MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layers(batch).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.layers(batch).square().mean()
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.error.update(loss)
        self.log("error", self.error)

    def on_train_epoch_end(self) -> None:
        self.log("late", random.random())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class EveryHook(Checkpoint):
    """Takes a checkpoint in each of `HOOKS`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def _saving(name: str) -> Callable[..., None]:
    def hook(self: EveryHook, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(list(self.folder.glob('*.ckpt'))):03}-{name}.ckpt")

    return hook


for _name in HOOKS:
    setattr(EveryHook, _name, _saving(_name))


def fit(folder: Path, data: Any, callbacks: list[Any], seed: int, ckpt_path: Any = None) -> tuple[Any, ...]:
    """What a fit ends with: weights, log, metrics, and the next random number."""
    torch.manual_seed(1)
    module = Model()
    torch.manual_seed(seed)
    random.seed(seed)
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        num_sanity_val_steps=1,
        log_every_n_steps=2,
        logger=CSVLogger(folder, name="", version="log"),
        enable_checkpointing=None,
        callbacks=[*callbacks, *([] if ckpt_path else [EveryHook(folder)])] or None,
        enable_model_summary=False,
        **({} if isinstance(data, NoisyStream) and not isinstance(data, SizedStream) else {"val_check_interval": 2}),
    )
    validation = DataLoader(Noisy(4), 2, shuffle=True, generator=torch.Generator().manual_seed(4))
    shuffle = None if isinstance(data, IterableDataset) else True
    trainer.fit(module, DataLoader(data, 2, shuffle=shuffle), validation, ckpt_path=ckpt_path)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return weights(module), (folder / "log/metrics.csv").read_text(), metrics, torch.rand(()), random.random()


@pytest.mark.parametrize(
    ("data", "average", "every"),
    [(Noisy(6), False, 2), (NoisyStream(), False, 4), (SizedStream(), False, 4), (Noisy(6), True, 6)],
)
def test_a_fit_goes_on_from_every_hook(tmp_path: Path, data: Any, average: bool, every: int) -> None:
    def callbacks() -> list[Any]:
        return [StochasticWeightAveraging(0.02, swa_epoch_start=1)] if average else []

    whole = fit(tmp_path / "whole", data, callbacks(), seed=2)
    taken = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert {path.stem.partition("-")[2] for path in taken} == set(HOOKS)
    for path in taken[::every]:
        shutil.copytree(tmp_path / "whole", tmp_path / "kept")
        resumed = fit(tmp_path / "whole", data, callbacks(), seed=3, ckpt_path=path)
        assert_same_bits(resumed[0], whole[0])
        assert resumed[1:] == whole[1:], path.name
        shutil.rmtree(tmp_path / "whole")
        (tmp_path / "kept").rename(tmp_path / "whole")


@pytest.mark.parametrize("taken", [1, 3, 6])
def test_a_fit_goes_on_from_where_a_resumed_one_begins(tmp_path: Path, taken: int) -> None:
    class Saving(Checkpoint):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.progress.batches_total}-again.ckpt")

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.progress.batches_total}.ckpt")

    def run(seed: int, ckpt_path: Any = None) -> tuple[Any, ...]:
        torch.manual_seed(1)
        module = Model()
        torch.manual_seed(seed)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[Saving()], enable_checkpointing=None
        )
        trainer.fit(module, DataLoader(Noisy(6), 2, shuffle=True), DataLoader(Noisy(2), 2), ckpt_path=ckpt_path)
        return weights(module), torch.rand(())

    whole = run(seed=2)
    run(3, tmp_path / f"{taken}.ckpt")
    again = run(4, tmp_path / f"{taken}-again.ckpt")
    assert_same_bits(again[0], whole[0])
    assert again[1] == whole[1]


def test_a_fit_that_was_stopped_stays_so_when_it_goes_on_by_itself_and_trains_on_from_a_path(tmp_path: Path) -> None:
    def epochs(ckpt_path: Any = None) -> int:
        keeper = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
        stopper = EarlyStopping("val_loss", min_delta=1000.0, patience=1, verbose=False)
        trainer = quiet_trainer(tmp_path, max_epochs=9, callbacks=[keeper, stopper], enable_checkpointing=True)
        trainer.fit(Model(), DataLoader(Noisy(6), 2), DataLoader(Noisy(4), 2), ckpt_path=ckpt_path)
        return trainer.current_epoch

    assert epochs() == 2
    assert epochs("last") == 2
    assert epochs(tmp_path / "last.ckpt") == 3
