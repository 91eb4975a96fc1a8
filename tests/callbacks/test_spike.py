from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TRAINING_ALONE, Net, quiet_trainer, regression_loader

from lightlite.callbacks import SpikeDetection
from lightlite.callbacks.spike import TrainingSpikeException
from lightlite.errors import MisconfigurationException

from .programs import SavesAfter

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Scripted(Net):
    """Has the losses that it is given, on one rank; elsewhere 1.0."""

    def __init__(self, losses: list[float], rank: int = 0) -> None:
        super().__init__()
        self.losses, self.rank = losses, rank

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        value = self.losses[batch_idx] if self.trainer.global_rank == self.rank else 1.0
        return sum(parameter.sum() for parameter in self.parameters()) * 0 + value


def last_batch(losses: list[float], callback: SpikeDetection, **settings: Any) -> int | None:
    """The batch in which the fit ended by a leap; None where there was none."""
    net = Scripted(losses, settings.pop("rank", 0))
    trainer = quiet_trainer(Path.cwd(), callbacks=[callback], **settings)
    try:
        trainer.fit(net, regression_loader(len(losses) * settings.get("devices", 1)))
    except TrainingSpikeException as leap:
        return leap.batch_idx
    finally:
        trainer.close()
    return None


@pytest.mark.parametrize(
    ("losses", "options", "batch_idx"),
    [
        ([1.0, 1.1, 0.9, 1.0], {}, None),
        ([1.0, 1.1, 0.9, 9.0], {}, 3),
        ([1.0, 1.1, 0.9, 9.0], {"rtol": 10.0}, None),
        ([1.0, 1.1, 0.9, 9.0], {"atol": 9.0}, None),
        ([1.0, 9.0, 1.0, 9.0], {"warmup": 2}, None),
        ([1.0, 9.0, 1.0, 9.0], {"warmup": 2, "window": 1}, 3),
        ([9.0, 9.0, 0.1, 9.0], {"mode": "max", "rtol": 0.5}, 2),
        ([1.0, 1.0, math.nan, 1.0], {}, 2),
        ([1.0, 1.0, math.inf, 1.0], {"finite_only": False}, None),
    ],
)
def test_a_leap_away_from_the_running_mean_ends_the_fit(
    losses: list[float], options: dict[str, Any], batch_idx: int | None
) -> None:
    assert last_batch(losses, SpikeDetection(**options)) == batch_idx
    if batch_idx is not None:
        assert json.loads(Path("skip_batches.json").read_text()) == [batch_idx - 1, batch_idx]


def test_a_leap_on_one_rank_ends_the_fit_on_all() -> None:
    callback = SpikeDetection(exclude_batches_path="noted")
    assert last_batch([1.0, 1.0, 9.0], callback, devices=2, rank=1) == 2
    assert json.loads(Path("noted/skip_batches.json").read_text()) == [1, 2]


def test_what_it_has_seen_outlives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    callbacks = [SpikeDetection(), SavesAfter(path, 0)]
    quiet_trainer(tmp_path, callbacks=callbacks).fit(Scripted([1.0, 1.2]), regression_loader(2))
    state = torch.load(path, weights_only=True)["callbacks"]["SpikeDetection"]
    callback = SpikeDetection()
    callback.load_state_dict(state)
    assert callback.state_dict() == state
    assert state["recent"] == pytest.approx([1.0, 1.2])


def test_the_exception_passes_between_processes() -> None:
    assert pickle.loads(pickle.dumps(TrainingSpikeException(7))).batch_idx == 7
    assert str(TrainingSpikeException(7)) == "Training spike detected in batch 7"


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"mode='low'\); give 'min' or 'max'"):
        SpikeDetection(mode="low")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"window=0\); give an int >= 1"):
        SpikeDetection(window=0)

    class NoLoss(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"accuracy": 1.0}

    net = NoLoss()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="found no loss in what training_step returned"):
        quiet_trainer(tmp_path, callbacks=[SpikeDetection()]).fit(net, regression_loader())
