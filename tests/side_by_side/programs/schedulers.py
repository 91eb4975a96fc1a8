"""Learning-rate schedulers by step, by epoch and by a watched value, with frequency and name, and their monitor."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, kind: str = "step"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.l1_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        kind = self.hparams.kind
        if kind == "step":
            total = self.trainer.estimated_stepping_batches
            cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=total)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step", "name": "cycle"}}
        if kind == "epoch":
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]
        if kind == "frequency":
            slow = {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5), "frequency": 2}
            fast = {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.95), "interval": "step", "frequency": 3}
            return [optimizer], [slow, fast]
        if kind == "lambda":
            return [optimizer], [{"scheduler": lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)}]
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.2)
        if kind == "plateau":
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}
        if kind == "plateau_by_step":
            config = {"scheduler": plateau, "monitor": "train_loss", "interval": "step", "frequency": 2}
            return {"optimizer": optimizer, "lr_scheduler": config}
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        chain = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[3])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": chain, "interval": "step"}}


class Slowed(Model):
    """Overrides how a scheduler is stepped."""

    def lr_scheduler_step(self, scheduler, metric):
        if self.current_epoch % 2 == 0:
            super().lr_scheduler_step(scheduler, metric)


KINDS = ("step", "epoch", "frequency", "lambda", "plateau", "plateau_by_step", "chain")


def main(folder, ckpt_path=None):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(8))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    results = {}
    for kind, accumulate in [*((kind, 1) for kind in KINDS), ("step", 2), ("frequency", 2)]:
        name = f"{kind}_{accumulate}"
        for cls in (Model, Slowed) if name == "epoch_1" else (Model,):
            pl.seed_everything(4)
            model = cls(kind)
            monitor = pl.callbacks.LearningRateMonitor(log_momentum=kind == "step")
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=3,
                accumulate_grad_batches=accumulate,
                logger=pl.loggers.CSVLogger(folder, name=f"{cls.__name__}_{name}"),
                callbacks=[monitor, pl.callbacks.ModelCheckpoint(save_top_k=-1)],
                log_every_n_steps=2,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(
                model,
                DataLoader(data, batch_size=5),
                DataLoader(data, batch_size=10),
                ckpt_path=ckpt_path if name == "step_1" else None,
            )
            results[cls.__name__, name] = {
                "weights": model.state_dict(),
                "callback_metrics": trainer.callback_metrics,
                "logged_metrics": trainer.logged_metrics,
                "lrs": monitor.lrs,
                "configs": [(c.name, c.interval, c.frequency, c.monitor) for c in trainer.lr_scheduler_configs],
            }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
