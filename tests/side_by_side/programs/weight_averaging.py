"""Averaged weights: an exponential moving average by step, a schedule of one's own, and stochastic averaging (SWA)."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, norm: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class EveryThird(pl.callbacks.WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx % 3 == 0


def fit(folder, name, averaging, norm, ckpt_path=None):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(6))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    pl.seed_everything(12)
    model = Model(norm)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=5,
        logger=pl.loggers.CSVLogger(folder, name=name),
        callbacks=[averaging, pl.callbacks.ModelCheckpoint(save_top_k=-1)],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(data, batch_size=4), DataLoader(data, batch_size=10)
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return {
        "weights": model.state_dict(),
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "validate": trainer.validate(model, loaders[1], verbose=False),
    }


def main(folder, ckpt_path=None):
    callbacks = pl.callbacks
    results = {
        "ema": fit(folder, "ema", callbacks.EMAWeightAveraging(decay=0.9), False, ckpt_path),
        "third": fit(folder, "third", EveryThird(), True),
        "swa": fit(
            folder,
            "swa",
            callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=2),
            False,
        ),
        "swa_norm": fit(folder, "swa_norm", callbacks.StochasticWeightAveraging(swa_lrs=0.02), True),
    }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
