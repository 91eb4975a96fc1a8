"""On one process a fit is the hand-written loop: the same random numbers, the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl

from .models import FEATURES, TRAINING_ALONE, assert_same_bits, quiet_trainer, regression_data, weights

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)

EPOCHS = 3
LOSS = nn.functional.mse_loss


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))


def shuffled(samples: int = 22, **options: Any) -> DataLoader[Any]:
    return DataLoader(regression_data(samples), **{"batch_size": 4, "shuffle": True, **options})


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


class Wrapped(pl.LightningModule):
    """The same net as a LightningModule; keeps the losses of all batches."""

    def __init__(self, optimizer: str = "sgd", schedule: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.net = dropout_net()
        self.optimizer = optimizer
        self.schedule = schedule
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = LOSS(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", LOSS(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.net.parameters())
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


def by_hand(
    loader: DataLoader[Any],
    optimizer: str = "sgd",
    *,
    schedule: Callable[[Any], Any] | None = None,
    schedule_each: str = "epoch",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    accumulate: int = 1,
    after_epoch: Callable[[nn.Module], None] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """The loop as anybody writes it. Returns the state in the end and the loss of every batch."""
    torch.manual_seed(5)
    net = dropout_net()
    stepper = OPTIMIZERS[optimizer](net.parameters())
    scheduler = schedule(stepper) if schedule is not None else None
    losses = []
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            loss = LOSS(net(x), y)
            losses.append(loss.item())
            (loss / accumulate).backward()
            if (index + 1) % accumulate:
                continue
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(net.parameters(), clip_value)
            stepper.step()
            stepper.zero_grad()
            if scheduler is not None and schedule_each == "step":
                scheduler.step()
        if scheduler is not None and schedule_each == "epoch":
            scheduler.step()
        if after_epoch is not None:
            after_epoch(net)
    return weights(net), losses


def by_trainer(
    folder: Path, loader: Any, optimizer: str = "sgd", schedule: Any = None, val: Any = None, **settings: Any
) -> tuple[dict[str, Tensor], list[float]]:
    torch.manual_seed(5)
    module = Wrapped(optimizer, schedule)
    quiet_trainer(folder, max_epochs=EPOCHS, **settings).fit(module, loader, val)
    return weights(module.net), module.losses


def assert_same_run(actual: tuple[Any, list[float]], expected: tuple[Any, list[float]]) -> None:
    assert actual[1] == expected[1]
    assert_same_bits(actual[0], expected[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dropout_and_a_shuffling_loader(tmp_path: Path, optimizer: str) -> None:
    assert_same_run(by_trainer(tmp_path, shuffled(), optimizer), by_hand(shuffled(), optimizer))


def test_drop_last(tmp_path: Path) -> None:
    assert_same_run(by_trainer(tmp_path, shuffled(drop_last=True)), by_hand(shuffled(drop_last=True)))


@pytest.mark.parametrize("samples", [20, 22])
def test_a_loader_with_its_own_generator(tmp_path: Path, samples: int) -> None:
    def loader() -> DataLoader[Any]:
        return shuffled(samples, generator=torch.Generator().manual_seed(3))

    assert_same_run(by_trainer(tmp_path, loader()), by_hand(loader()))


def test_a_weighted_sampler(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        sampler = torch.utils.data.WeightedRandomSampler(torch.linspace(0.1, 1, 22), 20)
        return shuffled(shuffle=False, sampler=sampler)

    assert_same_run(by_trainer(tmp_path, loader()), by_hand(loader()))


def test_loader_workers(tmp_path: Path) -> None:
    assert_same_run(
        by_trainer(tmp_path, shuffled(num_workers=1, persistent_workers=True)),
        by_hand(shuffled(num_workers=1, persistent_workers=True)),
    )


def test_any_iterable_is_a_loader(tmp_path: Path) -> None:
    made = list(DataLoader(regression_data(12), batch_size=4))

    class Batches:
        def __iter__(self) -> Any:
            return iter(made)

    assert_same_run(by_trainer(tmp_path, Batches()), by_hand(Batches()))  # type: ignore[arg-type]


def test_a_scheduler_per_epoch(tmp_path: Path) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    assert_same_run(by_trainer(tmp_path, shuffled(), schedule=schedule), by_hand(shuffled(), schedule=schedule))


def test_a_scheduler_per_step(tmp_path: Path) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * 6)

    assert_same_run(
        by_trainer(tmp_path, shuffled(), schedule=lambda o: {"scheduler": schedule(o), "interval": "step"}),
        by_hand(shuffled(), schedule=schedule, schedule_each="step"),
    )


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_gradients(tmp_path: Path, algorithm: str) -> None:
    assert_same_run(
        by_trainer(tmp_path, shuffled(), gradient_clip_val=0.3, gradient_clip_algorithm=algorithm),
        by_hand(shuffled(), **{f"clip_{algorithm}": 0.3}),
    )


def test_accumulated_gradients_of_whole_windows(tmp_path: Path) -> None:
    assert_same_run(
        by_trainer(tmp_path, shuffled(24), accumulate_grad_batches=2, gradient_clip_val=0.3),
        by_hand(shuffled(24), accumulate=2, clip_norm=0.3),
    )


def test_the_order_of_shuffling_is_the_same_with_a_progress_bar_a_logger_and_checkpoints(tmp_path: Path) -> None:
    actual = by_trainer(tmp_path, shuffled(), logger=True, enable_progress_bar=True, enable_checkpointing=True)
    assert_same_run(actual, by_hand(shuffled()))


def test_validation_on_an_unshuffled_loader_draws_what_the_loop_by_hand_draws(tmp_path: Path) -> None:
    validation = DataLoader(regression_data(6), batch_size=4)

    def validate(net: nn.Module) -> None:
        net.eval()
        with torch.no_grad():
            for x, _ in validation:
                net(x)
        net.train()

    assert_same_run(by_trainer(tmp_path, shuffled(), val=validation), by_hand(shuffled(), after_epoch=validate))


def test_the_sanity_validation_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    validation = DataLoader(regression_data(6), batch_size=4)
    assert_same_run(
        by_trainer(tmp_path, shuffled(), val=validation, limit_val_batches=1, num_sanity_val_steps=2),
        by_trainer(tmp_path, shuffled(), val=validation, limit_val_batches=1, num_sanity_val_steps=0),
    )


def test_a_shorter_last_window_gives_the_gradient_of_its_own_big_batch(tmp_path: Path) -> None:
    x, y = regression_data(10).tensors
    torch.manual_seed(5)
    net = nn.Linear(FEATURES, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for first, last in ((0, 4), (4, 8), (8, 10)):
        optimizer.zero_grad()
        LOSS(net(x[first:last]), y[first:last]).backward()
        optimizer.step()

    class Linear(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(FEATURES, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return LOSS(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(5)
    module = Linear()
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    quiet_trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader)
    for actual, expected in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_seed_everything_seeds_python_numpy_and_torch() -> None:
    import random

    import numpy as np

    drawn = []
    for _ in range(2):
        assert pl.seed_everything(41) == 41
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    torch.manual_seed(41)
    assert float(torch.rand(())) == drawn[0][2]
