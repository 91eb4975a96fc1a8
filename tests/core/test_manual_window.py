"""Gradients that a module accumulates by hand are in the checkpoint, where no step was made of them yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightlite.callbacks import Callback

from .models import Net, assert_same_bits, quiet_trainer, regression_loader, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader")


class ByHand(Net):
    """Steps after every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 3)
        if (batch_idx + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()


class EachStep(ByHand):
    """Sets gradients to zero at the beginning of each step, so that they are left where a batch ends."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Keeper(Callback):
    """Saves after every batch, whether it stepped or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.progress.batches_total}.ckpt")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_a_run_goes_on_with_the_gradients_accumulated_so_far(tmp_path: Path, batches: int, ranks: int) -> None:
    def run(ckpt_path: Path | None = None) -> ByHand:
        torch.manual_seed(0)
        module = ByHand()
        keeper = [Keeper(tmp_path)] if ckpt_path is None else []
        trainer = quiet_trainer(tmp_path, devices=ranks, callbacks=keeper)
        trainer.fit(module, regression_loader(6 * ranks), ckpt_path=ckpt_path)
        return module

    whole = run()
    assert_same_bits(weights(run(tmp_path / f"{batches}.ckpt")), weights(whole))
    windows = torch.load(tmp_path / f"{batches}.ckpt", weights_only=True)["lightlite"]["window"]
    assert [bool(window) for window in windows] == [batches % 3 != 0] * ranks


def test_gradients_that_are_used_up_are_left_out(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, callbacks=[Keeper(tmp_path)]).fit(EachStep(), regression_loader(2))
    assert torch.load(tmp_path / "1.ckpt", weights_only=True)["lightlite"]["window"] == [{}]
