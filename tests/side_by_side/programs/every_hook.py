"""Every hook of a module and of a callback: their order, the trainer's state in each, and a value logged in each."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LOGS = {
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end",
    "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_start",
    "on_validation_batch_end", "on_test_start", "on_test_epoch_start", "on_test_epoch_end", "on_test_batch_start",
    "on_test_batch_end",
}  # fmt: skip
"""Hooks in which Lightning lets a value be logged."""

EVENTS = []


def note(owner, hook, trainer):
    state = trainer.state
    EVENTS.append(
        (
            owner,
            hook,
            str(state.fn.value),
            str(getattr(state.stage, "value", None)),
            trainer.global_step,
            trainer.current_epoch,
            trainer.is_last_batch if state.fn == "fit" and hook.startswith("on_train_batch") else None,
            *(
                sorted(name for name in metrics if name[:2] not in ("m/", "c/"))
                for metrics in (trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics)
            ),
            (trainer.training, trainer.validating, trainer.sanity_checking, trainer.testing, trainer.predicting),
            torch.is_grad_enabled() if owner != "data" else None,
            trainer.lightning_module.training,
        )
    )


def value(trainer):
    return float(trainer.global_step + 1)


def watched(hook):
    def method(self, *args, **kwargs):
        if self._trainer is not None:
            note("module", hook, self.trainer)
        if hook in LOGS:
            self.log(f"m/{hook}", value(self.trainer), prog_bar="start" in hook)
        return getattr(pl.LightningModule, hook)(self, *args, **kwargs)

    return method


def watched_callback(hook):
    def method(self, trainer, pl_module, *args, **kwargs):
        note("callback", hook, trainer)
        if hook in LOGS:
            self.log(f"c/{hook}", value(trainer))

    return method


MODULE_HOOKS = [
    name
    for name in dir(pl.LightningModule)
    if name.startswith("on_") and name not in ("on_gpu", "on_before_batch_transfer", "on_after_batch_transfer")
    and name != "on_predict_model_train"  # which Lightning does not call
] + ["prepare_data", "setup", "teardown", "configure_model", "optimizer_step", "optimizer_zero_grad",
     "configure_gradient_clipping", "lr_scheduler_step", "backward"]  # fmt: skip
CALLBACK_HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_")] + ["setup", "teardown"]

Watched = type("Watched", (pl.LightningModule,), {name: watched(name) for name in MODULE_HOOKS})
Watcher = type("Watcher", (pl.Callback,), {name: watched_callback(name) for name in CALLBACK_HOOKS})


class Model(Watched):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        note("module", "training_step", self.trainer)
        loss = self.loss(batch)
        for on_step in (None, True, False):
            for on_epoch in (None, True, False):
                if on_step is not False or on_epoch:
                    self.log(
                        f"t/{on_step}_{on_epoch}", loss, on_step=on_step, on_epoch=on_epoch, prog_bar=bool(on_step)
                    )
        return loss

    def evaluate(self, batch, stage):
        note("module", f"{stage}_step", self.trainer)
        loss = self.loss(batch)
        for on_step in (None, True, False):
            for on_epoch in (None, True, False):
                if on_epoch is not False or on_step:
                    self.log(f"{stage}/{on_step}_{on_epoch}", loss, on_step=on_step, on_epoch=on_epoch, prog_bar=True)
        self.log(f"{stage}/quiet", loss, logger=False)
        self.log(f"{stage}/max", loss, reduce_fx="max")
        self.log(f"{stage}/own", loss, reduce_fx=torch.max)

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "validation")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def predict_step(self, batch, batch_idx):
        note("module", "predict_step", self.trainer)
        return self.net(batch[0])

    def configure_optimizers(self):
        note("module", "configure_optimizers", self.trainer)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        x = torch.randn(12, 3, generator=torch.Generator().manual_seed(6))
        self.data = TensorDataset(x, x.sum(1, keepdim=True))

    def prepare_data(self):
        note("data", "prepare_data", self.trainer)

    def setup(self, stage):
        note("data", f"setup {stage.value}", self.trainer)

    def teardown(self, stage):
        note("data", f"teardown {stage.value}", self.trainer)

    def loader(self, name):
        note("data", name, self.trainer)
        return DataLoader(self.data, batch_size=3)

    def train_dataloader(self):
        return self.loader("train_dataloader")

    def val_dataloader(self):
        return self.loader("val_dataloader")

    def test_dataloader(self):
        return self.loader("test_dataloader")

    def predict_dataloader(self):
        return self.loader("predict_dataloader")

    def on_before_batch_transfer(self, batch, dataloader_idx):
        note("data", "on_before_batch_transfer", self.trainer)
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        note("data", "on_after_batch_transfer", self.trainer)
        return batch


def main(folder, ckpt_path=None):
    results = {}
    for name, options in {
        "plain": {},
        "busy": {"accumulate_grad_batches": 2, "val_check_interval": 0.5, "gradient_clip_val": 1.0},
        "rare": {"check_val_every_n_epoch": 2, "max_epochs": 3, "limit_val_batches": 1},
    }.items():
        EVENTS.clear()
        pl.seed_everything(23)
        model = Model()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=pl.loggers.CSVLogger(folder, name=name),
            callbacks=[Watcher(), pl.callbacks.ModelCheckpoint(save_top_k=-1)],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_epochs": 2, **options},
        )
        trainer.fit(model, datamodule=Data(), ckpt_path=ckpt_path if name == "plain" else None)
        results[name] = {
            "weights": model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "progress_bar_metrics": trainer.progress_bar_metrics,
        }
        if name == "plain":
            results["validate"] = trainer.validate(model, datamodule=Data(), verbose=False)
            results["validate_metrics"] = (
                trainer.callback_metrics,
                trainer.logged_metrics,
                trainer.progress_bar_metrics,
            )
            results["test"] = trainer.test(model, datamodule=Data(), verbose=False)
            results["test_metrics"] = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
            results["predict"] = trainer.predict(model, datamodule=Data())
        results[name]["events"] = list(EVENTS)
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
