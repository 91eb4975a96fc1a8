"""A LightningModule that is a part of another one, such as a teacher or a pretrained backbone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lightlite as pl

from .models import TRAINING_ALONE, Net, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Part(Net):
    def score(self) -> None:
        self.seen = (self.trainer, self.current_epoch, self.global_step, self.device)
        self.log("of_the_part", float(self.global_step))


class Whole(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList([Part()])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.parts[0].score()
        return self.loss(batch)


def test_a_part_knows_the_trainer_and_logs_as_the_whole_does(tmp_path: Path) -> None:
    whole = Whole()
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(whole, regression_loader(3))

    assert whole.parts[0].seen == (trainer, 1, 5, torch.device("cpu"))
    assert trainer.callback_metrics["of_the_part"] == 5.0


def test_a_copy_of_the_whole_is_attached_to_nothing(tmp_path: Path) -> None:
    whole = Whole()
    quiet_trainer(tmp_path).fit(whole, regression_loader(1))

    part = copy.deepcopy(whole).parts[0]
    with pytest.raises(RuntimeError, match="Part is not attached to a Trainer"):
        _ = part.trainer


def test_setting_the_trainer_sets_it_in_all_parts() -> None:
    whole, trainer = Whole(), pl.Trainer(accelerator="cpu", devices=1, logger=False)
    whole.trainer = trainer

    assert whole.parts[0].trainer is trainer
