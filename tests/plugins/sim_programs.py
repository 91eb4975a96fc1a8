"""A module with everything that has to be moved to a device, its data, and a quiet Trainer on the simulated one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl


class Net(pl.LightningModule):
    """Parameters, a buffer that is saved and one that is not, batch norm, AdamW's state, and values logged."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))
        self.register_buffer("offset", torch.tensor([0.1, 0.0, -0.1]), persistent=False)
        self.lr = lr
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale + self.offset

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        hits = (logits.argmax(1) == batch[1]).float().mean()
        self.log_dict({"val_loss": nn.functional.cross_entropy(logits, batch[1]), "val_acc": hits})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4)  # float16 has none smaller
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def data(samples: int = 32) -> TensorDataset:
    """Inputs of shape (6,), and a class of three that follows from them."""
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x[:, :3].argmax(1))


def loader(samples: int = 32, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    """That data, in order."""
    return DataLoader(data(samples), batch_size, **options)


def net() -> Net:
    """The module, the same each time."""
    torch.manual_seed(0)
    return Net()


def trainer(*callbacks: pl.Callback, **overrides: Any) -> pl.Trainer:
    """A Trainer on the simulated device that prints and writes nothing unless asked to."""
    settings: dict[str, Any] = {
        "accelerator": "sim",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **overrides})
