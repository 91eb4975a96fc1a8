"""A module, data and a quiet Trainer for the tests of callbacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightlite as pl

VAL_LOSSES = (0.5, 0.3, 0.4, 0.2, 0.6, 0.1)


class Net(pl.LightningModule):
    """Validations score 0.5, 0.3, 0.4, 0.2, 0.6, 0.1, or what else is given, in turn."""

    def __init__(self, val_losses: tuple[float, ...] = VAL_LOSSES) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.val_losses = val_losses
        self.validations = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log("train_loss", loss, prog_bar=True)
        self.log("steps", float(self.global_step))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            value = self.val_losses[self.validations % len(self.val_losses)]
            self.log("val_loss", value)
            self.log("val/loss", value)
            self.validations += 1

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch).mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch[:, 0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Unvalidated(Net):
    """The same without validation."""

    validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]


def loader(batches: int = 4, batch_size: int = 2) -> DataLoader[Tensor]:
    """Sample i is (i, i, i, i)."""
    samples = torch.arange(batches * batch_size, dtype=torch.float32)
    return DataLoader(samples[:, None].expand(-1, 4).contiguous() / 10, batch_size=batch_size)  # type: ignore[arg-type]


def trainer(*callbacks: pl.Callback, **overrides: Any) -> pl.Trainer:
    """One CPU process that prints nothing, and writes what the callbacks write to the working directory."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    if not any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        settings["enable_checkpointing"] = False
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **overrides})


def fit(*callbacks: pl.Callback, module: Net | None = None, **overrides: Any) -> pl.Trainer:
    """Fit over 3 epochs of 4 batches, each epoch validated unless the module has no validation."""
    module = module or Net()
    run = trainer(*callbacks, **overrides)
    run.fit(module, loader(), None if isinstance(module, Unvalidated) else loader(1))
    return run


def checkpoints(folder: str | Path = ".") -> dict[str, int]:
    """The global step of each checkpoint file below a folder, by path."""
    paths = sorted(Path(folder).rglob("*.ckpt"))
    return {os.path.relpath(path, folder): torch.load(path, weights_only=True)["global_step"] for path in paths}


class SavesAfter(pl.Callback):
    """Writes a checkpoint after one batch, or at the end of an epoch where no batch is named; it has no state."""

    def __init__(self, path: str | Path, epoch: int, batch_idx: int | None = None) -> None:
        self.path, self.epoch, self.batch_idx = path, epoch, batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch_idx):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.batch_idx is None and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
