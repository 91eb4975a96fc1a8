"""A fit that goes on with other settings than it began with says what does not fit, or makes sense of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import lightlite as pl
from lightlite.errors import MismatchedCheckpointError

from .models import Net, quiet_trainer, regression_loader, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader", "ignore:.*state of callbacks")


class Saving(pl.callbacks.Checkpoint):
    """Takes a checkpoint after the second batch, whose path is `path`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "second.ckpt"

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.batches_total == 2:
            trainer.save_checkpoint(self.path)


class Scheduled(Net):
    """Net with the optimizer and the scheduler that it is given."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, scheduler: Any = StepLR) -> None:
        super().__init__()
        self.makers = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.makers[0](self.parameters(), lr=0.1)
        return [optimizer], [self.makers[1](optimizer, 3)]


def fit(folder: Path, model: Any = None, loader: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    saving = [] if ckpt_path else [Saving(folder)]
    torch.manual_seed(0)
    model = model or Net()
    trainer = quiet_trainer(folder, callbacks=saving, enable_checkpointing=None if saving else False, **settings)
    trainer.fit(model, loader or regression_loader(6), ckpt_path=ckpt_path)
    return weights(model)


@pytest.mark.parametrize("loader", [regression_loader(5), regression_loader(6, shuffle=True), [None, None]])
def test_an_epoch_of_other_batches_is_told(tmp_path: Path, loader: Any) -> None:
    fit(tmp_path)
    with pytest.warns(
        UserWarning, match=r"second.ckpt was taken within an epoch of 6 batches from DataLoader.*repeated"
    ):
        fit(tmp_path, loader=loader, ckpt_path=tmp_path / "second.ckpt")


@pytest.mark.parametrize(("window", "clip"), [(1, None), (2, None), (1, 1e6)])
def test_an_open_window_that_is_to_be_shorter_now_ends_with_the_mean_of_its_batches(
    tmp_path: Path, window: int, clip: float | None
) -> None:
    whole = fit(tmp_path, accumulate_grad_batches=3, max_steps=1)
    path = tmp_path / "second.ckpt"
    resumed = fit(tmp_path, ckpt_path=path, accumulate_grad_batches=window, max_steps=1, gradient_clip_val=clip)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


def test_the_state_of_another_model_optimizer_or_scheduler_is_told_with_the_file(tmp_path: Path) -> None:
    fit(tmp_path, Scheduled())
    path = tmp_path / "second.ckpt"
    with pytest.raises(MismatchedCheckpointError, match=r"second.ckpt.*another optimizer than SGD.*momentum"):
        fit(tmp_path, Scheduled(torch.optim.SGD), ckpt_path=path)
    wider = Scheduled()
    wider.layer = nn.Linear(8, 1)
    with pytest.raises(MismatchedCheckpointError, match=r"second.ckpt does not hold Scheduled's weights:(.|\n)*layer"):
        fit(tmp_path, wider, ckpt_path=path)
    with pytest.warns(UserWarning, match=r"another scheduler than CosineAnnealingLR, with gamma, step_size.*T_max"):
        fit(tmp_path, Scheduled(scheduler=CosineAnnealingLR), ckpt_path=path)
