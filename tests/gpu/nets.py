"""A small classifier with what a device has to carry along: buffers, dropout, an optimizer with state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class Net(pl.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 4)
        )
        self.losses: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layers(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-4)  # float16 has none smaller

    @property
    def curve(self) -> list[float]:
        return torch.stack(self.losses).tolist()


def data(samples: int = 256) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 16, generator=generator)
    return TensorDataset(x, (x[:, :4].sum(1) > 0).long() + 2 * (x[:, 4:8].sum(1) > 0).long())


def loader(num_workers: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=32, num_workers=num_workers, **options)


def fit(net: Net, accelerator: str, ckpt_path: Any = None, workers: int = 0, **settings: Any) -> pl.Trainer:
    pl.seed_everything(7, verbose=False)
    settings = {"max_epochs": 3, "devices": 1, "enable_checkpointing": False, **QUIET, **settings}
    trainer = pl.Trainer(accelerator=accelerator, **settings)
    trainer.fit(net, loader(workers, shuffle=True), loader(), ckpt_path=ckpt_path)
    return trainer
