"""A program for PyTorch Lightning, which knows nothing of lightlite: trains, and prints what it found as JSON."""

import json
import os
import pickle
import sys

import lightning as L
import pytorch_lightning as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks.early_stopping import EarlyStopping as FromItsModule
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Data(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        # Of the module under which this process knows it, to tell a worker's from a rank's.
        return torch.full((2,), float(index)), torch.tensor(pl.__version__ == "2.6.0" and "lightlite" in repr(pl))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        x, right = batch
        self.log("right", self.all_gather(right.float()).min())
        assert self.trainer.state.stage is RunningStage.TRAINING
        assert isinstance(self, L.LightningModule)
        return self.layer(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


@rank_zero_only
def tell(**facts):
    sys.stdout.write(json.dumps(facts) + "\n")


def main(devices, start_method):
    loader = DataLoader(Data(), batch_size=2, num_workers=bool(start_method), multiprocessing_context=start_method)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=1,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(monitor="right"), EarlyStopping("right")],
    )
    trainer.fit(Net(), loader)
    tell(
        world_size=trainer.world_size,
        right=trainer.callback_metrics["right"].item(),
        file=os.path.basename(trainer.checkpoint_callback.best_model_path),
        defined_in=[cls.__module__ for cls in (pl.Trainer, EarlyStopping, MisconfigurationException)],
        same=EarlyStopping is FromItsModule and pickle.loads(pickle.dumps(EarlyStopping)) is EarlyStopping,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
