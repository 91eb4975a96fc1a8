"""Callbacks with state, LambdaCallback, Timer, prediction writers by batch and epoch, and an interrupted fit."""

import os
import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Skipping(Model):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


class Counter(pl.Callback):
    def __init__(self, what="batches"):
        self.what, self.count = what, 0

    @property
    def state_key(self):
        return self._generate_state_key(what=self.what)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1 if self.what == "batches" else len(batch[0])
        self.log(f"seen_{self.what}", float(self.count))
        if batch_idx == 2:
            pl_module.log("third_loss", outputs["loss"], on_step=True, on_epoch=False)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint[f"counter_{self.what}"] = self.count


class Writer(pl.callbacks.BasePredictionWriter):
    def __init__(self, folder, interval):
        super().__init__(interval)
        self.folder = folder

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        torch.save((prediction, batch_indices), os.path.join(self.folder, f"batch_{dataloader_idx}_{batch_idx}.pt"))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save((predictions, batch_indices), os.path.join(self.folder, "epoch.pt"))


class Interrupter(pl.Callback):
    def __init__(self):
        self.exceptions = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            raise ValueError("enough")

    def on_exception(self, trainer, pl_module, exception):
        self.exceptions.append((type(exception).__name__, str(exception), trainer.global_step))


class Stopper(pl.Callback):
    """Stops within the third epoch; what it returns before a batch is not minded."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        return -1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            trainer.should_stop = True


def trainer_with(folder, name, callbacks, **options):
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 1}
    return pl.Trainer(
        logger=pl.loggers.CSVLogger(folder, name=name),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**settings, **options},
    )


def main(folder, ckpt_path=None):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(6))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    events = []
    note = pl.callbacks.LambdaCallback(
        on_train_epoch_start=lambda trainer, module: events.append(("epoch", trainer.current_epoch)),
        on_fit_end=lambda trainer, module: events.append(("end", trainer.global_step)),
        setup=lambda trainer, module, stage: events.append(("setup", stage.value)),
    )
    pl.seed_everything(19)
    model, counters = Model(), [Counter(), Counter("samples")]
    saving = pl.callbacks.ModelCheckpoint(save_top_k=-1)
    trainer = trainer_with(folder, "states", [note, pl.callbacks.Timer({"hours": 1}), *counters, saving])
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    path, evaluating = saving.best_model_path, Counter()
    trainer_with(folder, "evaluated", [evaluating]).predict(model, loader, ckpt_path=path, return_predictions=False)
    results = {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "events": events,
        "count_loaded": evaluating.count,
        "counts": [counter.count for counter in counters],
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "order": [type(callback).__name__ for callback in trainer.callbacks],
    }
    for interval in ("batch", "epoch", "batch_and_epoch"):
        where = os.path.join(folder, interval)
        os.makedirs(where)
        predicting = trainer_with(folder, "predict", [Writer(where, interval)])
        results[interval] = predicting.predict(model, [loader, loader], return_predictions=interval == "epoch")

    pl.seed_everything(19)
    model, interrupter = Model(), Interrupter()
    rescue = pl.callbacks.OnExceptionCheckpoint(dirpath=f"{folder}/rescue", filename="rescued")
    trainer = trainer_with(folder, "interrupted", [interrupter, rescue])
    try:
        trainer.fit(model, loader)
    except ValueError as error:
        results["raised"] = str(error)
    results["interrupted"] = (
        interrupter.exceptions,
        trainer.interrupted,
        trainer.state.status.value,
        model.state_dict(),
    )

    pl.seed_everything(19)
    model = Skipping()
    trainer = trainer_with(folder, "stopped", [Stopper()], max_epochs=5)
    trainer.fit(model, loader)
    results["stopped"] = (trainer.global_step, trainer.current_epoch, model.state_dict())
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
