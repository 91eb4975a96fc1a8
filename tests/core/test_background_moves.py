"""Batches that a device moves while it computes: on a stand-in for such a device, the CPU, which notes what it does."""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import lightlite as pl
from lightlite.loops.batches import one_ahead
from lightlite.plugins.cpu import CPUAccelerator

events: list[tuple[str, float]] = []


class Moving(CPUAccelerator):
    """Notes when it begins to move a batch and when that is wanted; batches are told apart by their first number."""

    pin_memory: ClassVar[bool] = False

    def batch_mover(self, device: torch.device) -> Callable[[Any], Any] | None:
        def move(batch: Any) -> Any:
            events.append(("move", first(batch)))
            return batch

        return move

    def background_mover(self, device: torch.device) -> Callable[[Any], Callable[[], Any]] | None:
        def begin(batch: Any) -> Callable[[], Any]:
            events.append(("begin", first(batch)))

            def finish() -> Any:
                events.append(("finish", first(batch)))
                return batch

            return finish

        return begin


def first(batch: Any) -> float:
    return float(batch.flatten()[0])


class Numbers(Dataset[Tensor]):
    """Samples that are their own index, times a random factor where one is asked for."""

    def __init__(self, length: int, noise: bool = False) -> None:
        self.length, self.noise = length, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index * (1 + torch.rand(()).item() if self.noise else 1.0)])


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        events.append(("step", first(batch)))
        return (self.layer(batch) * torch.rand(()) + random.random()).square().mean()  # draws as dropout would

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        events.append(("step", first(batch)))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(**kwargs: Any) -> pl.Trainer:
    bare: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    bare |= {"enable_model_summary": False, "accelerator": Moving(), "devices": 1, "max_epochs": 1}
    return pl.Trainer(**(bare | kwargs))


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:
    events.clear()


WORKERS: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
AHEAD = [("begin", 0), ("begin", 1), ("finish", 0), ("step", 0), ("begin", 2), ("finish", 1), ("step", 1)]
AHEAD += [("finish", 2), ("step", 2)]
IN_TURN = [(what, batch) for batch in range(3) for what in ("begin", "finish", "step")]


def test_a_batch_that_workers_load_moves_while_the_one_before_is_trained_on() -> None:
    trainer().fit(Net(), DataLoader(Numbers(3), **WORKERS))
    assert events == AHEAD


def test_evaluation_has_the_next_batch_on_its_way_too() -> None:
    trainer().test(Net(), DataLoader(Numbers(3), **WORKERS), verbose=False)
    assert events == AHEAD


def test_a_batch_that_is_loaded_in_the_process_itself_is_not_fetched_before_its_turn() -> None:
    trainer().fit(Net(), DataLoader(Numbers(3)))
    assert events == IN_TURN


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(number)]) for number in range(3))


def test_a_loader_without_a_length_is_fetched_no_further_ahead_than_it_is_anyway() -> None:
    trainer().fit(Net(), DataLoader(Stream(), batch_size=1, **WORKERS))
    assert events == AHEAD


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device"])
def test_a_transfer_of_the_users_own_happens_in_its_turn(hook: str) -> None:
    net = Net()
    noted: list[float] = []

    def take(batch: Any, *_: Any) -> Any:
        noted.append(first(batch))
        events.append(("user", first(batch)))
        return batch

    setattr(net, hook, take)
    trainer().fit(net, DataLoader(Numbers(3), **WORKERS))
    assert [event for event in events if event[0] in ("user", "step")] == [
        (what, batch) for batch in range(3) for what in ("user", "step")
    ]
    assert not [event for event in events if event[0] == "begin"]
    moved = [] if hook == "transfer_batch_to_device" else [0, 1, 2]
    assert [batch for what, batch in events if what == "move"] == moved


def test_what_is_done_after_the_transfer_is_done_in_the_batchs_turn() -> None:
    net = Net()

    def after(batch: Any, _: int) -> Any:
        events.append(("after", first(batch)))
        return batch + 10

    net.on_after_batch_transfer = after  # type: ignore[method-assign]
    trainer().fit(net, DataLoader(Numbers(2), **WORKERS))
    assert events == [
        *(("begin", 0), ("begin", 1), ("finish", 0), ("after", 0), ("step", 10)),
        *(("finish", 1), ("after", 1), ("step", 11)),
    ]


def test_predictions_stay_in_order_and_know_their_indices() -> None:
    seen: list[Any] = []

    class Writer(pl.callbacks.BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *_: Any) -> None:
            seen.append((prediction.tolist(), list(indices)))

    loader = DataLoader(Numbers(4), batch_size=2, **WORKERS)
    predictions = trainer(callbacks=[Writer("batch")]).predict(Net(), loader)
    assert [batch.flatten().tolist() for batch in predictions] == [[0, 1], [2, 3]]
    assert seen == [([[0], [1]], [0, 1]), ([[2], [3]], [2, 3])]


def test_an_error_in_loading_comes_after_the_batches_before_it() -> None:
    class Faulty(Numbers):
        def __getitem__(self, index: int) -> Tensor:
            if index == 2:
                raise ValueError("sample 2 is broken")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="sample 2 is broken"):
        trainer().fit(Net(), DataLoader(Faulty(4), **WORKERS))
    assert [batch for what, batch in events if what == "step"] == [0, 1]


def test_one_ahead_yields_all_and_fetches_one_more() -> None:
    fetched: list[int] = []
    items = (fetched.append(number) or number for number in range(3))  # type: ignore[func-returns-value]
    ahead = one_ahead(items)
    assert fetched == []
    assert (next(ahead), fetched) == (0, [0, 1])
    assert [*ahead] == [1, 2]
    assert [*one_ahead(iter(()))] == []


class Drawing(Sampler[int]):
    """Draws each index as it is asked for: fetched one batch ahead, its generator is one number further."""

    def __init__(self, length: int) -> None:
        self.length, self.generator = length, torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[int]:
        return (int(torch.randint(self.length, (), generator=self.generator).item()) for _ in range(self.length))

    def __len__(self) -> int:
        return self.length


class Stop(pl.Callback):
    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def _no_warning() -> Any:
    return contextlib.nullcontext()


def steps(events: Sequence[tuple[str, float]]) -> list[float]:
    return [batch for what, batch in events if what == "step"]


@pytest.mark.parametrize(
    ("at", "accelerator"),
    [(3, Moving()), (3, "cpu"), (8, Moving()), (11, Moving())],
    ids=["first epoch", "first epoch, not ahead", "its last batch", "second epoch"],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, at: int, accelerator: Any) -> None:
    def run(callbacks: list[pl.Callback], ckpt_path: Path | None) -> tuple[list[float], Net]:
        events.clear()
        pl.seed_everything(3, verbose=False)
        net = Net()
        loader = DataLoader(Numbers(8, noise=True), sampler=Drawing(8), **WORKERS)
        fit = trainer(accelerator=accelerator, max_epochs=2, callbacks=callbacks).fit
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                fit(net, loader)
        else:
            fit(net, loader, ckpt_path=None if ckpt_path is None else str(ckpt_path))
        return steps(events), net

    whole, expected = run([], None)
    begun, _ = run([Stop(at, tmp_path / "kept.ckpt")], None)
    rest, resumed = run([], tmp_path / "kept.ckpt")
    assert begun + rest == whole
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), resumed.parameters(), strict=True))


def test_fabrics_loaders_have_the_next_batch_on_its_way() -> None:
    fabric = pl.Fabric(accelerator=Moving(), devices=1)
    for batch in fabric.setup_dataloaders(DataLoader(Numbers(3), **WORKERS)):
        events.append(("step", first(batch)))
    assert events == AHEAD


class Pinning(Moving):
    pin_memory: ClassVar[bool] = True


def test_batches_that_workers_load_are_pinned_where_that_is_of_use_and_the_users_loader_is_left_alone() -> None:
    seen: list[tuple[bool, bool]] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            seen.append((trainer.train_dataloader.pin_memory, loader.pin_memory))

    for kind, workers in ((Pinning, {}), (Moving, WORKERS), (Pinning, WORKERS)):
        loader: DataLoader[Tensor] = DataLoader(Numbers(1), **workers)
        with pytest.warns(UserWarning, match="pin_memory") if kind is Pinning and workers else _no_warning():
            trainer(accelerator=kind(), callbacks=[Look()]).fit(Net(), loader)
    assert seen == [(False, False), (False, False), (True, False)]


def test_no_batch_outlives_the_fit() -> None:
    class Keeping(Net):
        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            batches.append(weakref.ref(batch))

    batches: list[weakref.ref[Tensor]] = []
    running = trainer()
    running.fit(Keeping(), DataLoader(Numbers(3), **WORKERS))
    gc.collect()
    assert [batch() for batch in batches] == [None] * 3
