"""Iterable data, with a length and without, validated every few batches and ended by a number of steps."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.samples):
            x = torch.randn(3, generator=generator)
            yield {"x": x, "y": x.sum().reshape(1), "text": "one"}


class KnownStream(Stream):
    def __len__(self):
        return self.samples


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch["x"]), batch["y"])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.log("train_mean", loss, on_step=False, on_epoch=True)
        self.log("is_last", float(self.trainer.is_last_batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(folder, name, train, ckpt_path=None, **options):
    pl.seed_everything(5)
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=pl.loggers.CSVLogger(folder, name=name),
        callbacks=[pl.callbacks.ModelCheckpoint(save_top_k=-1, every_n_epochs=1)],
        log_every_n_steps=3,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, train, DataLoader(Stream(5, 2), batch_size=2), ckpt_path=ckpt_path)
    return {
        "weights": model.state_dict(),
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "batches": (trainer.num_training_batches, trainer.num_val_batches),
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
    }


def main(folder, ckpt_path=None):
    unknown = DataLoader(Stream(22, 1), batch_size=4)
    known = DataLoader(KnownStream(22, 1), batch_size=4)
    results = {
        "unknown": fit(folder, "unknown", unknown, ckpt_path, max_epochs=3),
        "steps": fit(folder, "steps", unknown, max_steps=10, val_check_interval=4),
        "across": fit(folder, "across", unknown, max_steps=11, val_check_interval=5, check_val_every_n_epoch=None),
        "limited": fit(folder, "limited", unknown, max_epochs=2, limit_train_batches=3, limit_val_batches=1),
        "known": fit(folder, "known", known, max_epochs=2, val_check_interval=0.5),
    }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
