"""Handwritten digits: train, validate, checkpoint the best, test it, predict with it.

The 1,797 images of 8 x 8 pixels come with scikit-learn; nothing is downloaded. On two CPU ranks:

    python -m lightlite.launch --devices 2 --accelerator cpu scripts/examples/digits.py
    python scripts/examples/digits.py --devices 2

Without dropout (`--dropout 0`), 1 and 2 ranks give the same loss curve up to rounding.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.loggers import CSVLogger

TRAIN, VAL, TEST = 1200, 237, 360
"""Images in each part. 1200 is a multiple of many rank counts, so that no image is needed twice in an epoch."""


class Digits(pl.LightningDataModule):
    """scikit-learn's digits in a fixed split, the same on every rank and in every run.

    Args:
        batch_size: Global training batch: what all ranks together take in one step.
        seed: Seed of the training order. It has a generator of its own, so that dropout does not change it.
        workers: Loader processes of each rank; 0 loads in the rank itself.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0, workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed, self.workers = batch_size, seed, workers

    def setup(self, stage: str) -> None:
        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
        everything = TensorDataset(images, torch.tensor(bunch.target))
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0)).tolist()
        self.train_set = Subset(everything, order[:TRAIN])
        self.val_set = Subset(everything, order[TRAIN : TRAIN + VAL])
        self.test_set = Subset(everything, order[TRAIN + VAL :])

    def train_dataloader(self) -> DataLoader[Any]:
        world_size = self.trainer.world_size
        return DataLoader(
            self.train_set,
            batch_size=max(1, self.batch_size // world_size),
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._in_order(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._in_order(self.test_set)

    def _in_order(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=64, num_workers=self.workers)


class ConvNet(pl.LightningModule):
    """Three convolutions and two linear layers, 90,000 parameters.

    Everything in it is smooth (GELU, average pooling), so that rounding differences between one rank and two
    stay as small as they start.

    Shapes: images (batch, 1, 8, 8) float32 in 0 … 1; labels (batch,) int64; logits (batch, 10).

    Args:
        lr: Peak learning rate of AdamW; it rises over the first third of the steps, then falls to zero.
        dropout: Probability of dropping a feature before each linear layer.
    """

    def __init__(self, lr: float = 6e-3, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * 2 * 2, 128),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._score("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1).cpu()

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.print(
            f"epoch {self.current_epoch + 1:2d} of {self.trainer.max_epochs}   "
            f"training loss {metrics['train_loss_epoch'].item():.4f}   "
            f"validation accuracy {metrics['val_acc'].item():.2%}"
        )

    def configure_optimizers(self) -> dict[str, Any]:
        lr = self.hparams["lr"]
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _score(self, part: str, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        values = {f"{part}_loss": F.cross_entropy(logits, labels), f"{part}_acc": accuracy}
        self.log_dict(values, prog_bar=True, batch_size=len(labels))


def drawn(images: list[Tensor], captions: list[str]) -> str:
    """Images of 8 x 8 side by side in characters, each under its caption."""
    shades = " .:-=+*#%@"
    lines = ["   ".join(f"{caption:16s}" for caption in captions)]
    for row in range(8):
        pixels = [[shades[round(9 * value)] * 2 for value in image[0, row].tolist()] for image in images]
        lines.append("   ".join("".join(line) for line in pixels))
    return "\n".join(line.rstrip() for line in lines)


def report(trainer: pl.Trainer, data: Digits, predictions: Tensor, accuracy: float, seconds: float) -> str:
    """What the run came to: some of its mistakes, and a short table."""
    labels = torch.stack([label for _, label in data.test_set])
    wrong = (predictions != labels).nonzero().flatten().tolist()
    checkpoint, logger = trainer.checkpoint_callback, trainer.logger
    device = trainer.strategy.root_device.type
    rows = {
        "accuracy": f"{accuracy:.2%} of {len(labels)} test images ({len(wrong)} wrong)",
        "checkpoint": getattr(checkpoint, "best_model_path", "none"),
        "logs": getattr(logger, "log_dir", "none"),
        "devices": f"{trainer.world_size} x {device}",
        "time": f"{seconds:.0f} s",
    }
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != device:
        count, name = torch.accelerator.device_count(), accelerator.type
        rows["faster"] = f"{count} x {name} here: add --accelerator {name} --devices {count}"
    shown = wrong[:4]
    captions = [f"{labels[i]}, taken for {predictions[i]}" for i in shown]
    mistakes = drawn([data.test_set[i][0] for i in shown], captions) + "\n\n" if shown else ""
    return mistakes + "\n".join(f"{name:10s}  {value}" for name, value in rows.items())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small convolutional net on handwritten digits.")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps, … (default: what is there)")
    parser.add_argument("--devices", default="auto", help="how many, or which: 2, 0,3 (default: auto)")
    parser.add_argument("--strategy", default="auto", help="single, ddp, … (default: auto)")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, … (default: 32-true)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="global batch, over all ranks (default: 64)")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-workers", type=int, default=0, help="loader processes of each rank (default: 0)")
    parser.add_argument("--root-dir", default="logs/digits", help="where logs and checkpoints go")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.monotonic()
    pl.seed_everything(args.seed)
    data = Digits(args.batch_size, args.seed, args.data_workers)
    model = ConvNet(args.lr, args.dropout)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        precision=args.precision,
        max_epochs=args.epochs,
        logger=CSVLogger(args.root_dir, name=None),
        callbacks=[ModelCheckpoint(monitor="val_acc", mode="max", filename="{epoch:02d}-{val_acc:.4f}")],
        log_every_n_steps=5,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    tested = trainer.test(datamodule=data, ckpt_path="best", verbose=False)
    predicted = trainer.predict(datamodule=data, ckpt_path="best")
    if trainer.is_global_zero:
        print()
        print(report(trainer, data, torch.cat(predicted), tested[0]["test_acc"], time.monotonic() - started))


if __name__ == "__main__":
    main()
