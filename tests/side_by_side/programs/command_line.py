"""LightningCLI: a model and a data module from arguments, an optimizer and a scheduler from the command line."""

import sys

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, hidden: int = 4, activation: str = "tanh"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(3, hidden), nn.Tanh() if activation == "tanh" else nn.ReLU(), nn.Linear(hidden, 1)
        )

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))


class Data(pl.LightningDataModule):
    def __init__(self, samples: int = 16, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        x = torch.randn(self.hparams.samples, 3, generator=torch.Generator().manual_seed(6))
        self.data = TensorDataset(x, x.sum(1, keepdim=True))

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=self.hparams.batch_size)

    test_dataloader = val_dataloader


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--folder", default=".")
        parser.link_arguments("data.batch_size", "model.hidden")


def main(folder, ckpt_path=None):
    arguments = ["fit", "--seed_everything=21", "--model.activation=relu", "--data.batch_size=5"]
    arguments += ["--optimizer=Adam", "--optimizer.lr=0.03", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.7"]
    arguments += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    arguments += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=logs"]
    arguments += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    arguments += ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=epoch"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments += ["--trainer.log_every_n_steps=1"]
    if ckpt_path is not None:
        arguments.append(f"--ckpt_path={ckpt_path}")
    cli = CLI(Model, Data, args=arguments)
    trainer = cli.trainer
    torch.save(
        {
            "weights": cli.model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "hparams": dict(cli.model.hparams),
            "data_hparams": dict(cli.datamodule.hparams),
            "test": trainer.test(cli.model, datamodule=cli.datamodule, verbose=False),
        },
        f"{folder}/results.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
