"""Several loaders: nested and combined in training, one after the other in validation, test and prediction."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.seen = []

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        labelled, parts = batch["labelled"], batch["plain"]
        if labelled is None or any(part is None for part in parts):
            self.seen.append((batch_idx, labelled is None, [part is None for part in parts]))
            return None
        self.seen.append((batch_idx, len(labelled[0]), [len(part[0]) for part in parts]))
        loss = self.loss(labelled) + 0.1 * sum(self.net(part[0]).abs().mean() for part in parts)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(labelled[0]))
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        self.log("val_loss", loss, on_step=True, on_epoch=True)
        self.log(f"val_loss_of_{dataloader_idx}", loss, add_dataloader_idx=False, prog_bar=True)
        self.log("val_sum", loss, reduce_fx="sum")

    def on_validation_epoch_end(self):
        self.log("val_done", float(self.current_epoch))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log_dict({"test_loss": self.loss(batch), "test_max": batch[1].max()}, on_epoch=True, on_step=False)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"loader": dataloader_idx, "batch": batch_idx, "out": self.net(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer_in(folder, name):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=pl.loggers.CSVLogger(folder, name=name),
        callbacks=[pl.callbacks.ModelCheckpoint(monitor="val_loss/dataloader_idx_1", save_top_k=-1)],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(folder, ckpt_path=None):
    results = {}
    longer, shorter = data(20, 1), data(9, 2)
    vals = [DataLoader(data(7, 3), batch_size=3), DataLoader(data(4, 4), batch_size=2)]
    for mode in ("nest", "max_size_cycle", "min_size", "max_size", "sequential"):
        pl.seed_everything(3)
        model = Model()
        trainer = trainer_in(folder, mode)
        loaders = {
            "labelled": DataLoader(longer, batch_size=4, shuffle=True),
            "plain": [DataLoader(shorter, batch_size=4), DataLoader(shorter, batch_size=3, shuffle=True)],
        }
        if mode == "sequential":
            train = {**loaders, "plain": loaders["plain"][:1]}
            vals_of_mode = pl.utilities.CombinedLoader({"a": vals[0], "b": vals[1]}, mode="sequential")
        else:
            train = loaders if mode == "nest" else pl.utilities.CombinedLoader(loaders, mode=mode)
            vals_of_mode = vals
        trainer.fit(model, train, vals_of_mode, ckpt_path=ckpt_path if mode == "nest" else None)
        results[mode] = {
            "weights": model.state_dict(),
            "seen": model.seen,
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "progress_bar_metrics": trainer.progress_bar_metrics,
            "batches": (trainer.num_training_batches, trainer.num_val_batches),
            "validate": trainer.validate(model, vals_of_mode, verbose=False),
            "test": trainer.test(model, vals, verbose=False),
            "predict": trainer.predict(model, vals),
        }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
