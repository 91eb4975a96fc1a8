"""What the recordings share: a module, loaders and a quiet Trainer, of whichever framework is being recorded."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

FEATURES = 3


def loader(batches: int, batch_size: int = 2) -> DataLoader[Any]:
    """`batches` batches of inputs, always the same."""
    data = torch.linspace(0.0, 1.0, batches * batch_size * FEATURES).reshape(-1, FEATURES)
    return DataLoader(TensorDataset(data), batch_size=batch_size)


class Stream(IterableDataset[Any]):
    """Samples without a known number of them."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(torch.ones(self.samples, FEATURES))


@functools.cache
def net(pl: Any) -> type:
    """The framework's LightningModule with each step, which logs nothing."""

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 1)

        def forward(self, batch: Any) -> Any:
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            return self.layer(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).mean()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch).mean()

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch).mean()

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Net


def trainer(pl: Any, **overrides: Any) -> Any:
    """A Trainer on one CPU process that prints nothing and writes nothing unless asked to."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "logger": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **overrides})


def observed(base: type, hooks: list[str], observe: Callable[[str, dict[str, Any]], None]) -> type:
    """A subclass of `base` in which each of `hooks` calls `observe(hook, arguments)` and goes on as before."""

    def override(name: str) -> Callable[..., Any]:
        signature = inspect.signature(getattr(base, name))
        parameters = list(signature.parameters)[1:]

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            observe(name, {**dict(zip(parameters, args, strict=False)), **kwargs})
            return getattr(super(subclass, self), name)(*args, **kwargs)

        hook.__name__, hook.__signature__ = name, signature  # type: ignore[attr-defined]
        return hook

    subclass = type(f"Observed{base.__name__}", (base,), {name: override(name) for name in hooks})
    return subclass


def in_own_folder(case: Callable[[Any], Any], pl: Any) -> Any:
    """What a case returns that has the working directory for itself."""
    former = Path.cwd()
    with tempfile.TemporaryDirectory(dir=former) as folder:
        os.chdir(folder)
        try:
            return case(pl)
        finally:
            os.chdir(former)


def part(pl: Any, name: str) -> Any:
    """A subpackage of the framework: "callbacks", "loggers", …"""
    return importlib.import_module(f"{pl.__name__}.{name}")
