"""LBFGS, which evaluates its closure several times a step, in automatic and in manual optimization."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, automatic: bool = True):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = automatic
        self.net = nn.Linear(4, 1)
        self.evaluations = 0

    def loss(self, batch):
        x, y = batch
        self.evaluations += 1
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        return optimizer.step(closure=closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def main(folder, ckpt_path=None):
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8)
    results = {}
    for automatic in (True, False):
        pl.seed_everything(2)
        model = Model(automatic)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            logger=pl.loggers.CSVLogger(folder, name=f"automatic_{automatic}"),
            callbacks=[pl.callbacks.ModelCheckpoint(save_top_k=-1)],
            gradient_clip_val=1.0 if automatic else None,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader, ckpt_path=ckpt_path if automatic else None)
        results[automatic] = {
            "weights": model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "evaluations": model.evaluations,
            "global_step": trainer.global_step,
        }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
