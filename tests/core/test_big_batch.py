"""What several ranks make of accumulated batches is the gradient of all those batches as one, at every step.

Also where the last window is short, where the last global batch is incomplete, and where ranks have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint, SpikeDetection, ThroughputMonitor
from lightlite.plugins.ddp import DDPStrategy

from .models import quiet_trainer, regression_data

pytestmark = pytest.mark.filterwarnings("ignore:ThroughputMonitor logs no operations")
SAMPLES = 64


class Indexed(Dataset[Any]):
    """Pairs of an index and x, of the first `samples`."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, regression_data(SAMPLES)[index][0]


class Stream(IterableDataset[Any]):
    """The same in order, or a part of it that depends on the rank."""

    def __init__(self, samples: int, share: Callable[[int], range] | None = None) -> None:
        self.samples, self.share = samples, share

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return (Indexed(SAMPLES)[i] for i in (self.share(rank) if self.share else range(self.samples)))


class SizedStream(Stream):
    def __len__(self) -> int:
        assert self.share is not None
        return len(self.share(torch.distributed.get_rank()))


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Module(pl.LightningModule):
    """Writes down, on each rank, which samples every batch had, and gradients and parameters before each step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net, self.folder = net(), folder
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x = batch
        self.seen.append(index.tolist())
        loss = self.net(x.double()).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("samples", float(len(index)), on_epoch=True, reduce_fx="sum")
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([[p.grad.clone(), p.detach().clone()] for p in self.net.parameters()])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("batches", 1.0, on_epoch=True, reduce_fx="sum")

    def on_train_end(self) -> None:
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def big_batch_gradient(parameters: list[Tensor], samples: list[int]) -> list[Tensor]:
    reference = net()
    for parameter, value in zip(reference.parameters(), parameters, strict=True):
        parameter.detach().copy_(value)
    reference(torch.stack([Indexed(SAMPLES)[i][1] for i in samples]).double()).square().mean().backward()
    return [parameter.grad for parameter in reference.parameters() if parameter.grad is not None]


def steps_of(folder: Path, ranks: int) -> list[list[int]]:
    """The samples of each optimizer step over all ranks, once its gradients have been compared with the big batch's."""
    windows: list[list[int]] = []
    per_rank = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    taken = [[entry for entry in seen if isinstance(entry[0], list)] for seen in per_rank]
    for rank, seen in enumerate(per_rank):
        step, samples = 0, []
        for entry in seen:
            if not isinstance(entry[0], list):
                samples += entry
                continue
            if rank == 0:
                windows.append([])
            windows[step] += samples
            step, samples = step + 1, []
    for step, window in enumerate(windows):
        expected = big_batch_gradient([value for _, value in taken[0][step]], window)
        for steps in taken:
            for (gradient, _), exact in zip(steps[step], expected, strict=True):
                torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-6)
    return windows


def by_rank(*counts: int) -> Callable[[int], range]:
    """A share of `counts[rank]` samples for each rank, the same for every one beyond."""
    return lambda rank: range(10 * rank, 10 * rank + counts[rank])


WINDOWS = {
    # 20 batches of two ranks, accumulated by 3: the last window is short
    "whole": (DataLoader(Indexed(40), batch_size=2), [12, 12, 12, 4], {}),
    # the last global batch has 2 of 4 samples, which both ranks share
    "incomplete": (DataLoader(Indexed(38), batch_size=2), [12, 12, 12, 2], {}),
    # 21 batches: rank 0 alone has one in the eleventh global batch, after the tenth in the same window
    "stream": (DataLoader(Stream(42), batch_size=2), [12, 12, 12, 6], {}),
    # each rank its own stream: of 10 and 7 batches, of which nothing is left out
    "own": (DataLoader(Stream(0, by_rank(10, 7)), batch_size=1), [6, 6, 4, 1], {"use_distributed_sampler": False}),
    "own of known length": (
        DataLoader(SizedStream(0, by_rank(4, 9)), batch_size=1),
        [6, 4, 3],
        {"use_distributed_sampler": False},
    ),
    # half of each stream, and at most six of each
    "own of known length, limited": (
        DataLoader(SizedStream(0, by_rank(4, 9)), batch_size=1),
        [5, 1],
        {"use_distributed_sampler": False, "limit_train_batches": 0.5},
    ),
    "own, limited": (
        DataLoader(Stream(0, by_rank(10, 4)), batch_size=1),
        [6, 4],
        {"use_distributed_sampler": False, "limit_train_batches": 6},
    ),
    "one has none": (DataLoader(Stream(0, by_rank(0, 4)), batch_size=1), [3, 1], {"use_distributed_sampler": False}),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_every_step_of_two_ranks_has_the_gradient_of_the_big_batch(tmp_path: Path, case: str) -> None:
    loader, expected, settings = WINDOWS[case]
    trainer = quiet_trainer(tmp_path, devices=2, accumulate_grad_batches=3, strategy=DDPStrategy(), **settings)
    trainer.fit(Module(tmp_path), loader)
    windows = steps_of(tmp_path, 2)
    assert [len(window) for window in windows] == expected
    assert trainer.global_step == len(expected)
    if case != "incomplete":
        drawn = [i for window in windows for i in window]
        assert len(set(drawn)) == len(drawn) == int(trainer.callback_metrics["samples"])


def test_a_stream_on_ranks_trains_as_one_process_that_accumulates(tmp_path: Path) -> None:
    ends = []
    for ranks, window in ((1, 3), (3, 1)):
        module = Module(tmp_path)
        callbacks: list[Any] = [
            SpikeDetection(warmup=100),
            ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])),
        ]
        trainer = quiet_trainer(
            tmp_path,
            devices=ranks,
            accumulate_grad_batches=window,
            max_epochs=2,
            gradient_clip_val=0.5,
            callbacks=callbacks,
        )
        trainer.fit(module, DataLoader(Stream(40), batch_size=2))
        ends.append((module, trainer.global_step, float(trainer.callback_metrics["loss_epoch"])))
    (one, steps, loss), (three, steps_of_three, loss_of_three) = ends
    assert steps == steps_of_three == 14
    assert loss_of_three == pytest.approx(loss, abs=1e-6)
    for expected, parameter in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-6)


def test_a_run_resumed_where_a_rank_has_no_part_ends_bit_for_bit_like_the_whole(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> list[Tensor]:
        keeper = ModelCheckpoint(tmp_path, "{epoch}-{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path,
            devices=2,
            accumulate_grad_batches=2,
            max_epochs=2,
            callbacks=[keeper],
            enable_checkpointing=True,
            use_distributed_sampler=False,
        )
        module = Module(tmp_path)
        trainer.fit(module, DataLoader(Stream(0, by_rank(3, 8)), batch_size=1), ckpt_path=ckpt_path)
        return [parameter.detach().clone() for parameter in module.parameters()]

    whole = run()
    for parameter, expected in zip(run(tmp_path / "epoch=0-step=3.ckpt"), whole, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("lacks", [0, 1])
def test_one_process_goes_on_within_a_window_in_which_a_rank_had_no_part(tmp_path: Path, lacks: int) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "use_distributed_sampler": False}

    class Saving(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.world_size == 2 and batch_idx == 2:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")

    counts = (2, 4) if lacks == 0 else (4, 2)
    quiet_trainer(tmp_path, devices=2, **settings).fit(Saving(tmp_path), DataLoader(Stream(0, by_rank(*counts)), 1))
    quiet_trainer(tmp_path, **settings).fit(
        Saving(tmp_path), DataLoader(Stream(4), 1), ckpt_path=tmp_path / "within.ckpt"
    )
    parameters = next(entry for entry in torch.load(tmp_path / "0.pt") if isinstance(entry[0], list))
    # half of a global batch, and a whole one
    half, whole = (
        big_batch_gradient([value for _, value in parameters], [index]) for index in (12 if lacks == 0 else 2, 3)
    )
    for (gradient, _), first, second in zip(parameters, half, whole, strict=True):
        torch.testing.assert_close(gradient, (first / 2 + second) / 1.5, rtol=1e-6, atol=1e-6)
