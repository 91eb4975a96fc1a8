"""A module, its data and its parts, with arguments that a command line can give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl
from lightlite.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable

FEATURES = 4
QUIET = (
    "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
)  # fmt: skip
"""Words for a run of one epoch that prints nothing."""
BARE = (*QUIET, "--trainer.enable_checkpointing=false")
"""The same, and no checkpoint."""
SGD = ("--optimizer=SGD", "--optimizer.lr=0.03")


class CommandNet(pl.LightningModule):
    """Two layers.

    Args:
        hidden: Width between them.
        lr: Learning rate.
    """

    def __init__(self, hidden: int = 2, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.first, self.second = nn.Linear(FEATURES, hidden), nn.Linear(hidden, 1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.second(self.first(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.second(self.first(batch[0]))


class OwnOptimizer(CommandNet):
    """Brings its optimizer along."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class DeepNet(CommandNet):
    """Has an argument of its own, and those of its base."""

    def __init__(self, depth: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth


class Encoder(pl.LightningModule):
    """A part that keeps hyper-parameters too."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(FEATURES, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Options:
    """Settings that come as one argument."""

    dropout: float = 0.5
    name: str = "none"


class Composed(CommandNet):
    """Is given its parts."""

    def __init__(self, encoder: Encoder, activation: nn.Module, options: Options | None = None) -> None:
        super().__init__()
        self.first, self.activation, self.options = encoder, activation, options  # type: ignore[assignment]


class Injected(CommandNet):
    """Is given what makes its optimizer and its scheduler."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [self.make_scheduler(optimizer)]


class CommandData(pl.LightningDataModule):
    """Regression data, the same for every purpose."""

    def __init__(self, samples: int = 4, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.samples, self.batch_size, self.width = samples, batch_size, batch_size + 1

    def loader(self) -> DataLoader[Any]:
        x = torch.randn(self.samples, FEATURES, generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class UnsavedCLI(LightningCLI):
    """Saves no configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"save_config_callback": None, **kwargs})


def state(module: nn.Module) -> list[float]:
    return [float(value) for tensor in module.state_dict().values() for value in tensor.flatten()]
