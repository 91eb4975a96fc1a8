"""An LSTM on long sequences: truncated back-propagation through time by hand, one optimizer step for each piece."""

import sys

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, hidden: int = 6, piece: int = 5):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x, state=None):
        out, state = self.lstm(x, state)
        return self.head(out), state

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        state, losses = None, []
        for piece_x, piece_y in zip(x.split(self.hparams.piece, 1), y.split(self.hparams.piece, 1), strict=True):

            def closure(piece_x=piece_x, piece_y=piece_y, before=state):
                out, after = self(piece_x, before)
                loss = nn.functional.mse_loss(out, piece_y)
                optimizer.zero_grad()
                self.manual_backward(loss)
                losses.append(loss.detach())
                closure.state = tuple(part.detach() for part in after)
                return loss

            optimizer.step(closure=closure)
            state = closure.state
        loss = torch.stack(losses).mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss, "pieces": len(losses)}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("pieces", outputs["pieces"])

    def on_train_epoch_end(self):
        scheduler = self.lr_schedulers()
        scheduler.step(self.trainer.callback_metrics["train_loss_epoch"])
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}


def main(folder, ckpt_path=None):
    pl.seed_everything(11, workers=True)
    time = torch.arange(21.0)
    waves = torch.stack([torch.sin(time * (0.2 + 0.05 * i)) for i in range(12)]).unsqueeze(-1)
    loader = DataLoader(TensorDataset(waves[:, :-1], waves[:, 1:]), batch_size=4)
    model = Model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        logger=pl.loggers.CSVLogger(folder, name="logs"),
        callbacks=[pl.callbacks.ModelCheckpoint(save_top_k=-1, monitor="train_loss", filename="{epoch}")],
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(model, train_dataloaders=loader, ckpt_path=ckpt_path)
    torch.save(
        {
            "weights": model.state_dict(),
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "progress_bar_metrics": trainer.progress_bar_metrics,
            "global_step": trainer.global_step,
            "best": trainer.checkpoint_callback.best_model_score,
        },
        f"{folder}/results.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
