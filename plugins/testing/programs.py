"""Small modules and runs that the conformance suites share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightlite.callbacks import Callback
from lightlite.module import LightningModule
from lightlite.trainer import Trainer

EPOCHS, BATCHES, BATCH_SIZE, FEATURES = 2, 4, 4, 3


class Parts(nn.Module):
    """One of each thing that has to be moved: parameters, trained and frozen, tied ones, a gradient, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.tied = self.layer.weight
        self.register_buffer("kept", torch.full((2,), 3.0))
        self.register_buffer("not_kept", torch.full((2,), 4.0), persistent=False)
        self.layer.weight.grad = torch.ones(2, 2)


class Net(LightningModule):
    """A small regression with batch normalization (or without), a buffer, AdamW and values that are logged."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 5), nn.BatchNorm1d(5) if norm else nn.Identity(), nn.Tanh(), nn.Linear(5, 1)
        )
        self.register_buffer("scale", torch.tensor([0.5]))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Predict; (batch, FEATURES) to (batch, 1)."""
        output: Tensor = self.layers(x) * self.scale
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean squared error."""
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.seen.append(loss.detach())
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the same."""
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The prediction."""
        return self.forward(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@dataclass
class Run:
    """What a fit came to.

    Attributes:
        module: The module, after it.
        losses: Each batch's.
        metrics: What was logged of epochs.
    """

    module: Net
    losses: list[float]
    metrics: dict[str, float]


class _Saves(Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self._path)


def data() -> TensorDataset:
    """Inputs of shape (FEATURES,) and a target of shape (1,), always the same."""
    x = torch.randn(BATCHES * BATCH_SIZE, FEATURES, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader(world_size: int = 1) -> DataLoader[Any]:
    """That data, in order, such that all ranks together take BATCH_SIZE at a time."""
    return DataLoader(data(), BATCH_SIZE // world_size)


def trainer(accelerator: Any, *callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that prints and writes nothing."""
    return Trainer(
        accelerator=accelerator,
        callbacks=list(callbacks),
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"devices": 1, **settings},
    )


def fit(
    accelerator: Any, save_to: Path | None = None, resume_from: Path | None = None, norm: bool = True, **settings: Any
) -> Run:
    """Train and validate for EPOCHS.

    Args:
        accelerator: Its name, or an instance.
        save_to: Where to save a checkpoint after the first epoch.
        resume_from: A checkpoint to go on from.
        norm: Whether the module has batch normalization.
        settings: More of Trainer's arguments.
    """
    module, callbacks = Net(norm), [] if save_to is None else [_Saves(save_to)]
    run = trainer(accelerator, *callbacks, **settings)
    batches = loader(run.world_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a warning is worth is not what is tested here
        run.fit(module, batches, batches, ckpt_path=resume_from)
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    return Run(module, [loss.item() for loss in module.seen], metrics)


def predict(accelerator: Any, **settings: Any) -> Tensor:
    """Predictions for all data, of shape (BATCHES * BATCH_SIZE, 1)."""
    run = trainer(accelerator, **settings)
    return torch.cat(run.predict(Net(), loader(run.world_size)))
