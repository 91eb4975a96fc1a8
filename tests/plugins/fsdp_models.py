"""What the tests of fsdp train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl

GLOBAL_BATCH, SAMPLES = 12, 60


def samples(count: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator))


class Blocks(pl.LightningModule):
    """Three residual blocks, and if wanted a batch normalization; notes each epoch's losses."""

    def __init__(self, width: int = 6, normalizes: bool = False, on_meta: bool = False) -> None:
        super().__init__()
        self.width, self.normalizes, self.on_meta = width, normalizes, on_meta
        self.losses: list[tuple[float, float]] = []
        self.blocks: nn.ModuleList | None = None

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        with torch.device("meta" if self.on_meta else "cpu"):
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(self.width, self.width), nn.Tanh()) for _ in range(3))
            self.norm = nn.BatchNorm1d(self.width) if self.normalizes else nn.Identity()
            self.head = nn.Linear(self.width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.blocks is not None
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return self.head(self.norm(inputs))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    def on_train_epoch_end(self) -> None:
        logged = self.trainer.callback_metrics
        self.losses.append((float(logged["loss"]), float(logged.get("val_loss", 0.0))))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=getattr(self, "lr", 1e-2))


def loader(devices: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(), GLOBAL_BATCH // devices, **options)


def trainer(folder: Path, strategy: Any = "fsdp", devices: int = 2, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    settings = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": folder, **quiet, **options}
    return pl.Trainer(strategy=strategy, devices=devices, **settings)


def fit(made: pl.Trainer, module: pl.LightningModule, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Fit, on batches that make the same global ones on any number of devices, and on five to validate."""
    torch.manual_seed(1)
    made.fit(module, loader(made.world_size, shuffle=True, **options), DataLoader(samples(25), 5), ckpt_path=ckpt_path)
    return module
