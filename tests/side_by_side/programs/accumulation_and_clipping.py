"""Gradient accumulation, clipping by norm and by value, validation within an epoch, checkpoints by step."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, skip: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        if self.hparams.skip and batch_idx % 4 == 1:
            return None
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss, "size": len(batch[0])}

    def on_before_optimizer_step(self, optimizer):
        norms = pl.utilities.grad_norm(self, norm_type=2)
        self.log("norm", norms.get("grad_2.0_norm_total", 0.0))

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class OwnClipping(Model):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.current_epoch > 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


BY_STEP = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{epoch}-{step}-{train_loss:.3f}"}


def fit(folder, name, model_class=Model, ckpt_path=None, skip=False, callbacks=(), saving=BY_STEP, **options):
    x = torch.randn(36, 3, generator=torch.Generator().manual_seed(6))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    pl.seed_everything(9)
    model = model_class(skip)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=pl.loggers.CSVLogger(folder, name=name),
        callbacks=[pl.callbacks.ModelCheckpoint(**saving), *callbacks],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loaders = DataLoader(data, batch_size=3, shuffle=True), DataLoader(data, batch_size=12)
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return {
        "weights": model.state_dict(),
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "progress_bar_metrics": trainer.progress_bar_metrics,
        "global_step": trainer.global_step,
    }


def main(folder, ckpt_path=None):
    schedule = pl.callbacks.GradientAccumulationScheduler(scheduling={0: 2, 1: 3})
    results = {
        "norm": fit(
            folder,
            "norm",
            ckpt_path=ckpt_path,
            saving={"save_top_k": -1},
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
        ),
        "value": fit(folder, "value", gradient_clip_val=0.1, gradient_clip_algorithm="value", val_check_interval=0.25),
        "both": fit(folder, "both", accumulate_grad_batches=4, gradient_clip_val=0.3, val_check_interval=5),
        "own": fit(folder, "own", OwnClipping),
        "skipped": fit(folder, "skipped", skip=True, gradient_clip_val=1.0),
        "scheduled": fit(folder, "scheduled", callbacks=[schedule]),
    }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
