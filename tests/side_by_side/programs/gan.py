"""A GAN: manual optimization, two optimizers in turn, toggling, clipping and schedulers stepped by hand."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, latent: int = 4, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent, 8), nn.ReLU(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.register_buffer("fixed", torch.randn(6, latent))

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, logits, real):
        target = torch.ones_like(logits) if real else torch.zeros_like(logits)
        return nn.functional.binary_cross_entropy_with_logits(logits, target)

    def training_step(self, batch, batch_idx):
        (real,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(real.shape[0], self.hparams.latent).type_as(real)

        self.toggle_optimizer(optimizer_g)
        assert not next(self.discriminator.parameters()).requires_grad
        loss_g = self.adversarial_loss(self.discriminator(self(z)), real=True)
        self.log("loss_g", loss_g, prog_bar=True)
        self.manual_backward(loss_g)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        with optimizer_d.toggle_model(sync_grad=True):
            loss_real = self.adversarial_loss(self.discriminator(real), real=True)
            loss_fake = self.adversarial_loss(self.discriminator(self(z).detach()), real=False)
            loss_d = (loss_real + loss_fake) / 2
            optimizer_d.zero_grad()
            self.manual_backward(loss_d)
            self.clip_gradients(optimizer_d, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer_d.step()
        self.log_dict({"loss_d": loss_d, "loss_real": loss_real}, on_step=True, on_epoch=True)

        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def validation_step(self, batch, batch_idx):
        (real,) = batch
        self.log("val_real", torch.sigmoid(self.discriminator(real)).mean())

    def on_validation_epoch_end(self):
        self.log("val_fake", torch.sigmoid(self.discriminator(self(self.fixed))).mean())

    def configure_optimizers(self):
        optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        decay_g = torch.optim.lr_scheduler.ExponentialLR(optimizer_g, 0.9)
        decay_d = torch.optim.lr_scheduler.ExponentialLR(optimizer_d, 0.8)
        return [optimizer_g, optimizer_d], [decay_g, decay_d]


def main(folder, ckpt_path=None):
    pl.seed_everything(7)
    points = torch.randn(40, 2) * 0.5 + torch.tensor([1.0, -1.0])
    train = DataLoader(TensorDataset(points[:32]), batch_size=8, shuffle=True)
    val = DataLoader(TensorDataset(points[32:]), batch_size=4)
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=pl.loggers.CSVLogger(folder, name="logs"),
        callbacks=[pl.callbacks.ModelCheckpoint(filename="gan-{epoch}-{step}", save_top_k=-1)],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train, val, ckpt_path=ckpt_path)
    torch.save(
        {
            "weights": model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "progress_bar_metrics": trainer.progress_bar_metrics,
            "global_step": trainer.global_step,
            "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
            "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        },
        f"{folder}/results.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
