"""The search for a learning rate: what it finds, and that it leaves no trace."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TRAINING_ALONE, ListLogger, assert_same_bits, quiet_trainer, regression_data, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightlite as pl
from lightlite.callbacks import LearningRateFinder
from lightlite.callbacks.lr_finder import LRFinder
from lightlite.errors import MisconfigurationException
from lightlite.tuner import Tuner

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Tuned(pl.LightningModule):
    """Has all that a trial changes: random numbers, running statistics, an optimizer with a state, a scheduler."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.seen: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_fit_start(self) -> None:
        self.seen.append("on_fit_start")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]


def loader(generator: torch.Generator | None = None) -> DataLoader[Any]:
    return DataLoader(regression_data(64), batch_size=8, shuffle=True, generator=generator)


def everything(module: pl.LightningModule, trainer: pl.Trainer, generator: torch.Generator) -> Any:
    """What a search must not change."""
    trainer_state = (trainer.global_step, trainer.current_epoch, trainer.max_epochs, trainer.max_steps)
    kept = (list(trainer.callbacks), list(trainer.loggers), trainer.limit_val_batches, dict(trainer.callback_metrics))
    random_state = (torch.get_rng_state().tolist(), generator.get_state().tolist())
    return (trainer_state, kept, random_state), weights(module), [part.training for part in module.modules()]


def test_the_suggestion_is_where_the_loss_falls_fastest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, trainer = Tuned(), quiet_trainer(tmp_path, max_epochs=20)
    found = Tuner(trainer).lr_find(module, loader(), min_lr=1e-5, max_lr=1.0)
    assert found is not None
    rates, losses = found.results["lr"], found.results["loss"]
    assert (len(rates), rates[0]) == (len(losses), 1e-5)
    assert rates[1] == 1e-5 * 1e5 ** (2 / 100)
    suggestion = found.suggestion()
    assert suggestion is not None
    index = rates.index(suggestion)
    slopes = [(after - before) / (2 * rates[index]) for before, after in [(losses[index - 1], losses[index + 1])]]
    assert slopes[0] < 0
    assert module.lr == suggestion


def test_a_linear_search_rises_by_equal_steps(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=20)
    found = Tuner(trainer).lr_find(
        Tuned(),
        loader(),
        min_lr=0.0,
        max_lr=0.1,
        num_training=10,
        mode="linear",
        early_stop_threshold=None,
        update_attr=False,
    )
    assert found is not None
    assert found.results["lr"] == pytest.approx([0.0, *(0.01 * step for step in range(2, 11))])


def test_the_suggestion_leaves_out_what_it_is_told_to() -> None:
    finder = LRFinder("linear", 0.0, 1.0, 5)
    finder.results = {"lr": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "loss": [9.0, 1.0, math.nan, 0.9, 0.5, 0.0]}
    assert finder.suggestion(0, 0) == 0.1
    assert finder.suggestion(1, 0) == 0.6
    assert finder.suggestion(1, 1) == 0.5
    with pytest.warns(UserWarning, match="of 6 steps, 1 with a finite loss are left after skip_begin=4 and skip_end=1"):
        assert finder.suggestion(4, 1) is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_search_leaves_no_trace(tmp_path: Path, fails: bool) -> None:
    class Failing(Tuned):
        fails_at: int | None = None

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == self.fails_at:
                raise ZeroDivisionError

    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    data = loader(generator)
    module = Failing()
    logger = ListLogger()
    trainer = quiet_trainer(tmp_path, logger=logger, max_epochs=2)
    trainer.fit(module, loader())
    logger.rows.clear()
    trainer.callback_metrics.clear()
    trainer.max_epochs = 9
    before = everything(module, trainer, generator)
    seen = list(module.seen)
    module.fails_at = 5 if fails else None
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        Tuner(trainer).lr_find(module, data, update_attr=False)
    after = everything(module, trainer, generator)
    assert after[0] == before[0]
    assert_same_bits(after[1], before[1])
    assert after[2] == before[2]
    assert (logger.rows, module.seen) == ([], seen)
    assert not [name for name in os.listdir(tmp_path) if "lr_find" in name]


def test_the_callback_trains_as_if_it_had_begun_with_the_rate(tmp_path: Path) -> None:
    def fit(lr: float | None) -> Tuned:
        torch.manual_seed(3)
        module = Tuned() if lr is None else Tuned(lr)
        callbacks = [LearningRateFinder(min_lr=1e-4, early_stop_threshold=None)] if lr is None else []
        quiet_trainer(tmp_path, max_epochs=12, callbacks=callbacks).fit(module, loader())
        return module

    searched = fit(None)
    assert searched.lr != 0.02
    assert_same_bits(weights(searched), weights(fit(searched.lr)))


def test_a_search_in_the_middle_of_a_fit_goes_on_with_the_fit(tmp_path: Path) -> None:
    rates = []

    class AtTheThirdEpoch(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                self.lr_find(trainer, pl_module)
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    finder = AtTheThirdEpoch(min_lr=1e-4, num_training_steps=30)
    module = Tuned()
    trainer = quiet_trainer(tmp_path, max_epochs=6, callbacks=[finder])
    trainer.fit(module, loader())
    assert trainer.global_step == 6 * 8
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["lr"]) > 11
    # The scheduler halves the rate after each epoch, counted from the beginning of the fit.
    assert rates == pytest.approx([0.02, 0.01, module.lr, module.lr / 8, module.lr / 16, module.lr / 32])


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=20, accumulate_grad_batches=4)
    found = Tuner(trainer).lr_find(Tuned(), loader(), num_training=12, early_stop_threshold=None, update_attr=False)
    assert found is not None
    assert len(found.results["lr"]) == len(found.results["loss"]) == 12


def test_the_search_ends_when_the_loss_rises(tmp_path: Path) -> None:
    class Rising(Tuned):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 0 + 2.0**batch_idx

    data = DataLoader(regression_data(200), batch_size=2)
    trainer = quiet_trainer(tmp_path)
    found = Tuner(trainer).lr_find(Rising(), data, early_stop_threshold=4.0, update_attr=False)
    assert found is not None
    losses = found.results["loss"]
    assert losses[-1] > 4 * losses[0]
    assert losses[-2] <= 4 * losses[0]


def test_two_ranks_find_the_same_rate_and_leave_no_trace(tmp_path: Path) -> None:
    class Telling(Tuned):
        def on_train_end(self) -> None:
            (tmp_path / f"{self.trainer.global_rank}").write_text(str(self.trainer.global_step))

    torch.manual_seed(0)
    module = Telling()
    before = weights(module)
    trainer = quiet_trainer(tmp_path, devices=2, max_epochs=20)
    found = Tuner(trainer).lr_find(module, loader(), min_lr=1e-3, max_lr=1e3, early_stop_threshold=9.0)
    assert found is not None
    assert 3 < len(found.results["lr"]) < 80, "rank zero ends the search for both"
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == str(len(found.results["lr"]))
    assert_same_bits(weights(module), before)
    assert module.lr == found.suggestion()


def test_hyperparameters_and_data_modules_may_keep_the_rate(tmp_path: Path) -> None:
    class WithHparams(Tuned):
        def __init__(self, learning_rate: float = 0.5) -> None:
            super().__init__()
            self.save_hyperparameters()
            del self.lr

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)

    module = WithHparams()
    found = Tuner(quiet_trainer(tmp_path, max_epochs=20)).lr_find(module, loader())
    assert found is not None
    assert module.hparams.learning_rate == found.suggestion()


def test_a_plot_shows_the_losses_and_the_suggestion() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    finder = LRFinder("exponential", 0.001, 1.0, 20)
    finder.results = {"lr": [finder.rate(step) for step in range(20)], "loss": [1.0 / (step + 1) for step in range(20)]}
    figure = finder.plot(suggest=True)
    (axes,) = figure.axes
    curve, dot = axes.lines
    assert list(curve.get_ydata()) == finder.results["loss"]
    assert list(dot.get_xdata()) == [finder.suggestion()]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "Learning rate", "Loss")
    _, mine = plt.subplots()
    assert finder.plot(ax=mine) is mine.figure
    plt.close("all")


def test_a_missing_matplotlib_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        LRFinder("linear", 0.0, 1.0, 5).plot()


def test_wrong_use_names_what_is_allowed(tmp_path: Path) -> None:
    class Two(Tuned):
        def configure_optimizers(self) -> Any:
            self.automatic_optimization = False
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    class Nameless(Tuned):
        def __init__(self) -> None:
            super().__init__()
            del self.lr

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tuner = Tuner(quiet_trainer(tmp_path))
    with pytest.raises(ValueError, match="mode='log': allowed are 'exponential', 'linear'"):
        tuner.lr_find(Tuned(), loader(), mode="log")
    with pytest.raises(MisconfigurationException, match=r"min_lr=1.0, max_lr=0.1; give a min_lr above 0 below max_lr"):
        tuner.lr_find(Tuned(), loader(), min_lr=1.0, max_lr=0.1)
    with pytest.raises(MisconfigurationException, match="num_training=0; give a number of steps of at least 1"):
        tuner.lr_find(Tuned(), loader(), num_training=0)
    with pytest.raises(
        MisconfigurationException, match="returned 2 optimizers; a learning rate can be searched for one"
    ):
        tuner.lr_find(Two(), loader())
    with pytest.raises(
        AttributeError, match=r"Nameless has no lr or learning_rate .* say what it is called by attr_name"
    ):
        tuner.lr_find(Nameless(), loader())
    with pytest.raises(AttributeError, match="Tuned has no rate to set"):
        tuner.lr_find(Tuned(), loader(), attr_name="rate")
    with pytest.raises(MisconfigurationException, match=r"lr_find\(method='test'\): .* in 'fit'"):
        tuner.lr_find(Tuned(), method="test")
    with pytest.raises(MisconfigurationException, match=r"give train_dataloaders and val_dataloaders"):
        tuner.lr_find(Tuned(), dataloaders=loader())
    both = Tuner(quiet_trainer(tmp_path, callbacks=[LearningRateFinder()]))
    with pytest.raises(ValueError, match="has a LearningRateFinder among its callbacks"):
        both.lr_find(Tuned(), loader())


def test_a_fast_dev_run_does_not_search(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, fast_dev_run=True)
    with pytest.warns(UserWarning, match="left out: fast_dev_run is on"):
        assert Tuner(trainer).lr_find(Tuned(), loader()) is None
