"""Random numbers wherever a program may draw them: in hooks, data and steps, which all share one generator."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

HOOKS = [
    "setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end",
    "on_train_epoch_end", "on_train_end", "on_fit_end", "on_sanity_check_start", "on_sanity_check_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_test_start", "on_test_epoch_start", "on_test_end",
    "on_predict_start", "on_predict_epoch_start", "on_predict_end", "on_before_zero_grad", "teardown",
]  # fmt: skip


def drawing(hook):
    def method(self, trainer, pl_module, *args, **kwargs):
        self.drawn.append((hook, torch.rand(1).item()))

    return method


class Drawing(type("Hooks", (pl.Callback,), {hook: drawing(hook) for hook in HOOKS})):
    def __init__(self):
        self.drawn = []


class Noisy(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((3,), float(index)) / 12 + 0.1 * torch.randn(3)


class NoisyStream(IterableDataset):
    def __iter__(self):
        for _ in range(10):
            yield torch.randn(3)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))

    def loss(self, batch):
        return (self.net(batch + 0.01 * torch.randn_like(batch)) - batch.sum(1, keepdim=True)).pow(2).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch + torch.randn_like(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(folder, ckpt_path=None):
    results = {}
    shuffled = DataLoader(Noisy(), batch_size=3, shuffle=True)
    stream = DataLoader(NoisyStream(), batch_size=4)
    other = DataLoader(Noisy(), batch_size=4, shuffle=True)
    for name, train, options in (
        ("shuffled", shuffled, {}),
        ("stream", stream, {}),
        ("other", other, {"val_check_interval": 2}),
        ("limited", shuffled, {"limit_train_batches": 2, "limit_val_batches": 1}),
        ("both", {"a": shuffled, "b": other}, {}),
    ):
        pl.seed_everything(37)
        model, drawing = Model(), Drawing()
        if name == "both":
            model.loss = lambda batch, model=model: Model.loss(
                model,
                batch["a"][: len(batch["b"])] + batch["b"][: len(batch["a"])] if isinstance(batch, dict) else batch,
            )
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            logger=pl.loggers.CSVLogger(folder, name=name),
            callbacks=[drawing, pl.callbacks.ModelCheckpoint(save_top_k=-1)],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        evaluated = [shuffled, other]
        trainer.fit(model, train, evaluated, ckpt_path=ckpt_path if name == "shuffled" else None)
        results[name] = {
            "weights": {key: value.clone() for key, value in model.state_dict().items()},
            "validate": trainer.validate(model, evaluated, verbose=False),
            "test": trainer.test(model, shuffled, verbose=False),
            "predict": trainer.predict(model, evaluated),
            "drawn": drawing.drawn,
            "next": torch.rand(2),
        }
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
