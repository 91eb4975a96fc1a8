"""torchmetrics' Metric and MetricCollection, logged as objects and by hand."""

import sys

import pytorch_lightning as pl
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.train_acc = MulticlassAccuracy(3)
        metrics = torchmetrics.MetricCollection([MulticlassAccuracy(3, average="micro"), MulticlassF1Score(3)])
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_", postfix="_end")
        self.val_acc = nn.ModuleList([MulticlassAccuracy(3), MulticlassAccuracy(3)])
        self.best = torchmetrics.MaxMetric()
        self.mean_loss = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        loss = nn.functional.cross_entropy(out, batch[1])
        self.train_acc(out, batch[1])
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
        self.mean_loss.update(loss)
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        out = self.net(batch[0])
        self.val_metrics.update(out, batch[1])
        accuracy = self.val_acc[dataloader_idx]
        accuracy(out, batch[1])
        self.log("val_acc", accuracy)

    def on_validation_epoch_end(self):
        values = self.val_metrics.compute()
        self.log_dict(values)
        self.best(values["val_MulticlassAccuracy"])
        self.log("val_best", self.best.compute(), prog_bar=True)
        self.val_metrics.reset()

    def test_step(self, batch, batch_idx):
        self.test_metrics(self.net(batch[0]), batch[1])
        self.log_dict(self.test_metrics, on_step=True, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val_acc/dataloader_idx_0", "strict": True},
        }


def main(folder, ckpt_path=None):
    pl.seed_everything(17)
    x = torch.randn(30, 4)
    data = TensorDataset(x, x[:, :3].argmax(1))
    train = DataLoader(data, batch_size=4, shuffle=True)
    vals = [DataLoader(data, batch_size=8), DataLoader(torch.utils.data.Subset(data, range(7)), batch_size=2)]
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=pl.loggers.CSVLogger(folder, name="logs"),
        callbacks=[
            pl.callbacks.ModelCheckpoint(
                save_top_k=-1, monitor="val_best", mode="max", filename="{epoch}-{val_best:.3f}"
            )
        ],
        log_every_n_steps=3,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train, vals, ckpt_path=ckpt_path)
    torch.save(
        {
            "weights": model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "progress_bar_metrics": trainer.progress_bar_metrics,
            "validate": trainer.validate(model, vals, verbose=False),
            "test": trainer.test(model, vals[1], verbose=False),
        },
        f"{folder}/results.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
