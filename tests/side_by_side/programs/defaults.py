"""The plainest program, with defaults for all that Trainer adds; then with other precisions and limits."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, width: int = 6, dropout: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(dropout), nn.Linear(width, 1))

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch):
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(folder, loaders, dropout=0.1, **options):
    pl.seed_everything(29)
    model = Model(dropout=dropout)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 2, "max_epochs": 2}
    trainer = pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{**settings, **options})
    trainer.fit(model, *loaders)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": (trainer.num_training_batches, trainer.num_val_batches),
        "log_dir": None if trainer.log_dir is None else str(trainer.log_dir).replace(str(folder), ""),
        "test": trainer.test(model, loaders[1], verbose=False),
    }


def main(folder, ckpt_path=None):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(6))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    loaders = DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8)
    pl.seed_everything(27)
    model = Model()
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=3, default_root_dir=folder, log_every_n_steps=2)
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    csv = {"logger": pl.loggers.CSVLogger(folder)}
    results = {
        "default": {
            "weights": model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "test": trainer.test(model, loaders[1]),
            "validate": trainer.validate(dataloaders=loaders[1]),
            "predict": trainer.predict(model, loaders[1]),
        },
        "bf16-mixed": fit(folder, loaders, precision="bf16-mixed", **csv),
        "64-true": fit(folder, loaders, precision="64-true", logger=False, enable_checkpointing=False),
        "overfit": fit(folder, loaders, overfit_batches=2, **csv),
        "limits": fit(folder, loaders, limit_train_batches=0.5, limit_val_batches=0.5, max_epochs=3, **csv),
        "min_steps": fit(folder, loaders, max_steps=6, min_epochs=1, max_epochs=None, **csv),
        "reload": fit(folder, [loaders[1], loaders[1]], dropout=0.0, reload_dataloaders_every_n_epochs=1,
                      num_sanity_val_steps=-1, **csv),
        "fast": fit(folder, loaders, fast_dev_run=2),
        "barebones": fit(folder, loaders, barebones=True, enable_progress_bar=None, enable_model_summary=None,
                         log_every_n_steps=None),
    }  # fmt: skip
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
