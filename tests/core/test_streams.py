"""Streams of data that know their place: a resumed run goes on there without drawing what came before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint

from .models import assert_same_bits, quiet_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader", "ignore:'set_vital' is deprecated")


class Stream(IterableDataset[Tensor]):
    """The numbers 0 … 15, once; notes what is drawn in this process."""

    def __init__(self) -> None:
        self.place = 0
        self.drawn: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        while self.place < 16:
            self.place += 1
            self.drawn.append(self.place - 1)
            yield torch.tensor([float(self.place - 1)])
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class SizedStream(Stream):
    def __len__(self) -> int:
        return 16


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.batches: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch.flatten().tolist())
        return self.layer(batch / 16).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def stateful_loader(data: Stream, workers: int) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(data, batch_size=2, num_workers=workers)


def plain_loader(data: Stream, workers: int) -> Any:
    return DataLoader(data, batch_size=2, num_workers=workers)


@pytest.mark.parametrize("data", [Stream, SizedStream])
@pytest.mark.parametrize(
    ("make", "workers"), [(plain_loader, 0), (stateful_loader, 0), (stateful_loader, 1), (plain_loader, 1)]
)
def test_a_resumed_run_goes_on_at_the_place(tmp_path: Path, data: type[Stream], make: Any, workers: int) -> None:
    def run(ckpt_path: Path | None = None) -> tuple[Model, Stream]:
        torch.manual_seed(0)
        module, stream = Model(), data()
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[keeper], enable_checkpointing=True)
        trainer.fit(module, make(stream, workers), ckpt_path=ckpt_path)
        return module, stream

    whole, _ = run()
    assert len(whole.batches) == 16
    for step in (3, 7, 8, 11):
        resumed, stream = run(tmp_path / f"step={step}.ckpt")
        assert resumed.batches == whole.batches[step:]
        assert_same_bits(weights(resumed), weights(whole))
        if not workers:
            assert len(stream.drawn) == 2 * (16 - step)


class Odd(Stream):
    """Its state is nothing that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "who": object()}


def test_a_state_that_cannot_be_kept_is_told_and_the_stream_gone_through(tmp_path: Path) -> None:
    path = tmp_path / "step=3.ckpt"
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, trainer = Model(), quiet_trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"state_dict of DataLoader.*is not kept in checkpoints.*of type object"):
        trainer.fit(whole, plain_loader(Odd(), 0))
    resumed, stream = Model(), Odd()
    keeper = ModelCheckpoint(tmp_path / "again", every_n_train_steps=3, save_top_k=0)
    trainer = quiet_trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True)
    trainer.fit(resumed, plain_loader(stream, 0), ckpt_path=path)
    assert resumed.batches == whole.batches[3:]
    assert len(stream.drawn) == 16


def test_a_loader_is_not_asked_for_its_state_before_it_is_iterated(tmp_path: Path) -> None:
    class Loader:
        iterated = False

        def __iter__(self) -> Iterator[Tensor]:
            self.iterated = True
            return iter([torch.ones(1, 1)] * 2)

        def state_dict(self) -> dict[str, int]:
            assert self.iterated
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise AssertionError

    quiet_trainer(tmp_path).fit(Model(), Loader())
