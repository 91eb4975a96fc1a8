"""Hyper-parameters, a data module, several ModelCheckpoints, EarlyStopping, and a model made from its checkpoint."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, seed: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.epochs_seen = 0

    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(self.hparams.seed))
        whole = TensorDataset(x, (x.sum(1) > 0).long())
        generator = torch.Generator().manual_seed(2)
        self.train, self.val, self.rest = random_split(whole, [24, 8, 8], generator=generator)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.rest, batch_size=3)

    def predict_dataloader(self):
        return DataLoader(self.rest, batch_size=3)

    def state_dict(self):
        return {"epochs_seen": self.epochs_seen}

    def load_state_dict(self, state_dict):
        self.epochs_seen = state_dict["epochs_seen"]


class Base(pl.LightningModule):
    def __init__(self, lr: float, *, depth: int = 1, **more):
        super().__init__()
        self.save_hyperparameters(ignore=["ignored"])


class Model(Base):
    def __init__(
        self, width: int = 6, lr: float = 0.02, betas: tuple = (0.9, 0.99), ignored=None, depth: int = 2, **more
    ):
        super().__init__(lr, depth=depth, **more)
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        self.hparams.note = "kept"

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def evaluate(self, batch, stage):
        out = self(batch[0])
        self.log(f"{stage}/loss", nn.functional.cross_entropy(out, batch[1]))
        self.log(f"{stage}_acc", (out.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["extra"] = {"epoch": self.current_epoch}

    def on_load_checkpoint(self, checkpoint):
        self.loaded = checkpoint["extra"]

    def configure_callbacks(self):
        return [pl.callbacks.EarlyStopping("val/loss", patience=2, min_delta=0.002, check_finite=True)]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, betas=self.hparams.betas)


def main(folder, ckpt_path=None):
    pl.seed_everything(31)
    checkpoints = [
        pl.callbacks.ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=2, filename="{epoch}-{val_acc:.2f}"),
        pl.callbacks.ModelCheckpoint(monitor="val/loss", save_top_k=1, auto_insert_metric_name=False,
                                     filename="best-e{epoch:02d}-l{val/loss:.3f}"),
        pl.callbacks.ModelCheckpoint(dirpath=f"{folder}/weights", save_weights_only=True, every_n_epochs=2,
                                     save_top_k=-1, filename="weights-{step}"),
        pl.callbacks.ModelCheckpoint(filename="newest-{epoch}", save_last=True, save_on_train_epoch_end=True),
    ]  # fmt: skip
    model, data = Model(ignored=object(), extra="more"), Data()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=8,
        logger=pl.loggers.CSVLogger(folder, name="logs", version="first"),
        callbacks=checkpoints,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    stopping, last = trainer.early_stopping_callback, checkpoints[3].last_model_path
    results = {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "callback_metrics": trainer.callback_metrics,
        "hparams": dict(model.hparams),
        "hparams_initial": dict(model.hparams_initial),
        "stopped": (stopping.stopped_epoch, stopping.wait_count, stopping.best_score, trainer.current_epoch),
        "paths": [
            [path.replace(str(folder), "") for path in (callback.best_model_path, callback.last_model_path)]
            for callback in checkpoints
        ],
        "scores": [callback.best_model_score for callback in checkpoints],
        "test_best": trainer.test(ckpt_path="best", datamodule=data, verbose=False),
        "validate": trainer.validate(model, datamodule=data, verbose=False),
        "predict": trainer.predict(model, datamodule=data, ckpt_path=last),
    }
    again = Model.load_from_checkpoint(checkpoints[1].best_model_path, lr=0.5)
    results["again"] = (dict(again.hparams), again.loaded, again.state_dict())
    results["data_again"] = dict(Data.load_from_checkpoint(checkpoints[1].best_model_path, batch_size=5).hparams)
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
