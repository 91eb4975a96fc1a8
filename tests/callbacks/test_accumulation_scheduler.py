from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TRAINING_ALONE, CountingNet, Net, assert_same_bits, quiet_trainer, regression_loader, weights

from lightlite.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightlite.errors import MisconfigurationException

from .programs import SavesAfter

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Steps(Callback):
    """Keeps the number of steps that were taken by the end of each epoch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.counts.append(trainer.global_step)


def by_hand(net: Net, factors: list[int], batches: int) -> None:
    """The same as a loop: the mean of the losses of `factors[epoch]` batches, of those that are left at the end."""
    optimizer = net.configure_optimizers()
    for factor in factors:
        data = list(regression_loader(batches))
        for first in range(0, batches, factor):
            window = data[first : first + factor]
            optimizer.zero_grad()
            for batch in window:
                (net.loss(batch) / len(window)).backward()
            optimizer.step()


def test_each_epoch_accumulates_as_scheduled(tmp_path: Path, seeded: int) -> None:
    net, steps = Net(), Steps()
    expected = Net()
    expected.load_state_dict(net.state_dict())
    scheduling = {1: 2, 3: 4}
    callbacks = [GradientAccumulationScheduler(scheduling), steps]
    quiet_trainer(tmp_path, max_epochs=4, callbacks=callbacks).fit(net, regression_loader(4))
    assert steps.counts == [4, 6, 8, 9]
    by_hand(expected, [1, 2, 2, 4], 4)
    for name, value in weights(expected).items():
        torch.testing.assert_close(net.state_dict()[name], value)
    assert scheduling == {1: 2, 3: 4}


def test_a_fit_resumed_within_a_window_goes_on_with_it(tmp_path: Path, seeded: int) -> None:
    whole, resumed = CountingNet(), CountingNet()
    schedule, saving = GradientAccumulationScheduler({1: 3}), SavesAfter(tmp_path / "within.ckpt", 1, 4)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[schedule, saving]).fit(whole, regression_loader(8))
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[GradientAccumulationScheduler({1: 3})])
    trainer.fit(resumed, regression_loader(8), ckpt_path=tmp_path / "within.ckpt")
    assert resumed.trained == [(1, 5), (1, 6), (1, 7)]
    assert trainer.global_step == 8 + 3
    assert_same_bits(weights(resumed), weights(whole))


def test_the_trainer_is_left_as_it_was_for_a_further_fit(tmp_path: Path) -> None:
    steps = Steps()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[GradientAccumulationScheduler({0: 2}), steps])
    net = Net()
    trainer.fit(net, regression_loader(4))
    assert trainer.accumulate_grad_batches == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, regression_loader(4))
    assert steps.counts == [2, 4]


def test_the_estimate_of_steps_follows_the_schedule(tmp_path: Path) -> None:
    class Estimates(Net):
        def configure_optimizers(self) -> Any:
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    net = Estimates()
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[GradientAccumulationScheduler({1: 2, 3: 4})])
    trainer.fit(net, regression_loader(5))
    assert net.estimate == trainer.global_step == 5 + 3 + 3 + 2


def test_a_schedule_can_be_asked() -> None:
    schedule = GradientAccumulationScheduler({2: 4, 5: 1})
    assert [schedule.get_accumulate_grad_batches(epoch) for epoch in range(7)] == [1, 1, 4, 4, 4, 1, 1]
    assert schedule.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({0: 1}).going_to_accumulate_grad_batches()


@pytest.mark.parametrize("scheduling", [{}, None, [1, 2]])
def test_what_is_no_schedule_is_refused(scheduling: Any) -> None:
    with pytest.raises(TypeError, match=r"scheduling=.*give a dict of factors by epoch"):
        GradientAccumulationScheduler(scheduling)


@pytest.mark.parametrize("scheduling", [{-1: 2}, {0: 0}, {"1": 2}, {1: 2.0}, {1: True}])
def test_epochs_and_factors_that_cannot_be_are_refused(scheduling: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"scheduling=.*ints >= 0.*ints >= 1"):
        GradientAccumulationScheduler(scheduling)


def test_beside_the_trainers_own_argument_it_is_refused(tmp_path: Path) -> None:
    callbacks = [GradientAccumulationScheduler({1: 2}), ModelCheckpoint(tmp_path)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, accumulate_grad_batches=3, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=3\) beside"):
        trainer.fit(Net(), regression_loader())
    assert trainer.accumulate_grad_batches == 3


def test_in_manual_optimization_it_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="no effect in manual optimization"):
        quiet_trainer(tmp_path, callbacks=[GradientAccumulationScheduler({1: 2})]).fit(net, regression_loader())
