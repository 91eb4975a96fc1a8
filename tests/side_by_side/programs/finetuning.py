"""Fine-tuning: a backbone that is frozen at first, by BackboneFinetuning and by a callback of one's own."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])
        self.log("train_loss", loss)
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.log("trainable", float(sum(parameter.numel() for parameter in trainable)))
        return loss

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Stages(pl.callbacks.BaseFinetuning):
    """The backbone's last layer from epoch 1, all of it from epoch 2."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[-1], optimizer, initial_denom_lr=5)
        elif epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[:-1], optimizer, lr=0.01)


def fit(folder, name, callback, ckpt_path=None):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(6))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    pl.seed_everything(13)
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=5,
        logger=pl.loggers.CSVLogger(folder, name=name),
        callbacks=[
            callback,
            pl.callbacks.LearningRateMonitor("epoch"),
            pl.callbacks.ModelCheckpoint(save_top_k=-1),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return {
        "weights": model.state_dict(),
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "rates": [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers],
    }


def main(folder, ckpt_path=None):
    backbone = pl.callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.5, backbone_initial_ratio_lr=0.1, verbose=False
    )
    results = {"backbone": fit(folder, "backbone", backbone, ckpt_path), "stages": fit(folder, "stages", Stages())}
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
