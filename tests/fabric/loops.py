"""One loop by hand and the same with Fabric, for whoever compares them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl
from lightlite.fabric import Fabric

FEATURES = 4
State = dict[str, Tensor]


class Net(nn.Module):
    """A regression net with more than `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(x), y)


def data(samples: int = 64) -> TensorDataset:
    """Always the same pairs (x, y), shapes (FEATURES,) and (1,)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, FEATURES, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def weights(module: nn.Module) -> State:
    """A copy of the state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def by_hand(
    batch_size: int = 8,
    accumulate: int = 1,
    clip: Callable[[list[Any]], Any] | None = None,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
) -> State:
    """Two epochs of the loop as one writes it without Fabric; the final weights."""
    pl.seed_everything(5, verbose=False)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for index, (x, y) in enumerate(DataLoader(data(), batch_size=batch_size, shuffle=True)):
            with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
                out = model(x)
            loss = nn.functional.mse_loss(out.float(), y) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (index + 1) % accumulate:
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                clip(list(model.parameters()))
            optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    return weights(model)


def by_fabric(fabric: Fabric, batch_size: int = 8, accumulate: int = 1, clip: dict[str, float] | None = None) -> State:
    """The same with Fabric."""
    fabric.seed_everything(5, verbose=False)
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=batch_size, shuffle=True))
    for _ in range(2):
        for index, (x, y) in enumerate(loader):
            steps = (index + 1) % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not steps):
                fabric.backward(nn.functional.mse_loss(model(x), y) / accumulate)
            if not steps:
                continue
            if clip is not None:
                fabric.clip_gradients(model, optimizer, **clip)
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def one_device(**options: Any) -> Fabric:
    """A Fabric of this process alone, launched."""
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    fabric.launch()
    return fabric


def equal(one: State, other: State) -> bool:
    """Whether two states are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def distance(one: State, other: State) -> float:
    """The largest difference of any weight."""
    return max(float((value - other[name]).abs().max()) for name, value in one.items())
