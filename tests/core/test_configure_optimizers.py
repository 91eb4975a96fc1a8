"""Every documented return form of `configure_optimizers`, what its schedulers do, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau

import lightlite as pl
from lightlite.errors import MisconfigurationException

from .models import TRAINING_ALONE, LearningRates, Net, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Configured(Net):
    """Returns what `configure(module, optimizer)` makes of an SGD at lr 1 (which never changes the weights)."""

    def __init__(self, configure: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * 0.0

    def configure_optimizers(self) -> Any:
        return self.configure(self, torch.optim.SGD(self.parameters(), lr=1.0))


def halving(optimizer: Any) -> LRScheduler:
    return ExponentialLR(optimizer, 0.5)


def rates(folder: Path, configure: Callable[[Any, Any], Any], batches: int = 2, **settings: Any) -> list[float]:
    """The learning rate of every batch of two epochs."""
    callback = LearningRates()
    callbacks = [callback, *settings.pop("callbacks", [])]
    trainer = quiet_trainer(folder, **{"max_epochs": 2, "callbacks": callbacks, **settings})
    trainer.fit(Configured(configure), regression_loader(batches), regression_loader(1))
    return callback.values


@pytest.mark.parametrize(
    "configure",
    [
        lambda module, optimizer: optimizer,
        lambda module, optimizer: [optimizer],
        lambda module, optimizer: (optimizer,),
        lambda module, optimizer: ([optimizer], []),
        lambda module, optimizer: {"optimizer": optimizer},
    ],
)
def test_forms_without_a_scheduler(tmp_path: Path, configure: Any) -> None:
    assert rates(tmp_path, configure) == [1.0] * 4


@pytest.mark.parametrize(
    "configure",
    [
        lambda module, optimizer: ([optimizer], [halving(optimizer)]),
        lambda module, optimizer: [[optimizer], [halving(optimizer)]],
        lambda module, optimizer: ([optimizer], [{"scheduler": halving(optimizer)}]),
        lambda module, optimizer: {"optimizer": optimizer, "lr_scheduler": halving(optimizer)},
        lambda module, optimizer: {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer)}},
        lambda module, optimizer: (
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer), "interval": "epoch"}}
        ),
    ],
)
def test_a_scheduler_steps_each_epoch_by_default(tmp_path: Path, configure: Any) -> None:
    assert rates(tmp_path, configure) == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "settings", "expected"),
    [
        ({"interval": "step"}, {}, [1.0, 0.5, 0.25, 0.125]),
        ({"interval": "step", "frequency": 2}, {}, [1.0, 1.0, 0.5, 0.5]),
        ({"interval": "step"}, {"accumulate_grad_batches": 2}, [1.0, 1.0, 0.5, 0.5]),
        ({"interval": "epoch"}, {"max_epochs": 3}, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 3}, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),
    ],
)
def test_intervals_and_frequencies(
    tmp_path: Path, options: dict[str, Any], settings: dict[str, Any], expected: list[float]
) -> None:
    def configure(module: Any, optimizer: Any) -> Any:
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer), **options}}

    assert rates(tmp_path, configure, **settings) == expected


def test_two_schedulers_of_one_optimizer(tmp_path: Path) -> None:
    def configure(module: Any, optimizer: Any) -> Any:
        by_step = {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}
        return [optimizer], [by_step, {"scheduler": ExponentialLR(optimizer, 0.1), "interval": "epoch"}]

    assert rates(tmp_path, configure) == pytest.approx([1.0, 0.5, 0.025, 0.0125])


class Plateau(Configured):
    """Logs a validation value that never gets better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", 1.0)


@pytest.mark.parametrize(
    "configure",
    [
        lambda module, optimizer: {
            "optimizer": optimizer,
            "lr_scheduler": ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
            "monitor": "val",
        },
        lambda module, optimizer: {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
                "monitor": "val",
                "name": "plateau",
                "strict": True,
            },
        },
    ],
)
def test_reduce_on_plateau_sees_the_monitored_value(tmp_path: Path, configure: Any) -> None:
    callback = LearningRates()
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[callback])
    trainer.fit(Plateau(configure), regression_loader(1), regression_loader(1))
    assert callback.values == [1.0, 1.0, 0.5, 0.25]


def test_reduce_on_plateau_can_monitor_what_the_training_epoch_logs(tmp_path: Path) -> None:
    class TrainingPlateau(Configured):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def configure(module: Any, optimizer: Any) -> Any:
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train"}}

    callback = LearningRates()
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[callback])
    trainer.fit(TrainingPlateau(configure), regression_loader(1))
    assert callback.values == [1.0, 1.0, 0.5]


def test_reduce_on_plateau_without_a_monitor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="monitor"):
        rates(tmp_path, lambda module, optimizer: ([optimizer], [ReduceLROnPlateau(optimizer)]))


def test_a_monitor_that_nobody_logs_is_refused_listing_what_is_logged(tmp_path: Path) -> None:
    def configure(module: Any, optimizer: Any) -> Any:
        return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer), "monitor": "vla"}

    trainer = quiet_trainer(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"(?s)(?=.*vla)(?=.*\bval\b)"):
        trainer.fit(Plateau(configure), regression_loader(1), regression_loader(1))


def test_a_monitor_that_is_not_strict_only_warns(tmp_path: Path) -> None:
    def configure(module: Any, optimizer: Any) -> Any:
        config = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "vla", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}

    with pytest.warns(Warning, match="vla"):
        rates(tmp_path, configure)


def test_the_schedulers_own_step_can_be_overridden(tmp_path: Path) -> None:
    seen: list[tuple[str, Any]] = []

    class OwnStep(Configured):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            seen.append((type(scheduler).__name__, metric))
            scheduler.step()

    callback = LearningRates()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[callback])
    trainer.fit(OwnStep(lambda module, optimizer: ([optimizer], [halving(optimizer)])), regression_loader(2))
    assert seen == [("ExponentialLR", None)] * 2
    assert callback.values == [1.0, 1.0, 0.5, 0.5]


def test_lr_schedulers_and_optimizers_are_at_hand(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looks(Configured):
        def on_train_start(self) -> None:
            seen.extend([self.optimizers(), self.lr_schedulers(), self.trainer.optimizers])
            seen.append(self.trainer.lr_scheduler_configs[0])

    trainer = quiet_trainer(tmp_path)
    module = Looks(lambda module, optimizer: ([optimizer], [{"scheduler": halving(optimizer), "name": "mine"}]))
    trainer.fit(module, regression_loader(1))
    wrapped, scheduler, optimizers, config = seen
    assert wrapped.param_groups is optimizers[0].param_groups
    assert isinstance(scheduler, ExponentialLR)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.SGD]
    assert (config.name, config.interval, config.frequency, config.scheduler) == ("mine", "epoch", 1, scheduler)


def test_none_trains_nothing_and_says_so(tmp_path: Path) -> None:
    module = Configured(lambda module, optimizer: None)
    before = module.layer.weight.detach().clone()
    with pytest.warns(Warning, match="configure_optimizers"):
        quiet_trainer(tmp_path).fit(module, regression_loader(2))
    assert torch.equal(module.layer.weight, before)


def test_lbfgs_gets_a_closure(tmp_path: Path) -> None:
    calls: list[int] = []

    class Quadratic(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            calls.append(batch_idx)
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=5)

    torch.manual_seed(0)
    module = Quadratic()
    expected = torch.nn.Linear(4, 1)
    expected.load_state_dict(module.layer.state_dict())
    loader = regression_loader(2, batch_size=4)
    optimizer = torch.optim.LBFGS(expected.parameters(), lr=1.0, max_iter=5)
    for x, y in loader:

        def closure(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(expected(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    quiet_trainer(tmp_path).fit(module, loader)
    assert len(calls) > 4
    assert torch.equal(module.layer.weight, expected.weight)


def test_a_generator_of_optimizers_configured_lazily_is_read_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def configure(module: Any, optimizer: Any) -> Any:
        calls.append(1)
        return optimizer

    rates(tmp_path, configure)
    assert calls == [1]


@pytest.mark.parametrize(
    ("rubbish", "named"),
    [
        (lambda module, optimizer: 3, "3|int"),
        (lambda module, optimizer: "adam", "adam|str"),
        (lambda module, optimizer: [1, 2], r"\[1, 2\]|int|1"),
        (lambda module, optimizer: [optimizer, "adam"], "adam|str"),
        (lambda module, optimizer: {"optimiser": optimizer}, "optimiser"),
        (lambda module, optimizer: {"lr_scheduler": halving(optimizer)}, "lr_scheduler|optimizer"),
        (lambda module, optimizer: {"optimizer": "adam"}, "adam|str"),
        (lambda module, optimizer: ([optimizer], ["step"]), "step|str"),
        (lambda module, optimizer: ([optimizer], [{"interval": "step"}]), "scheduler"),
        (lambda module, optimizer: ([optimizer], [{"scheduler": halving(optimizer), "interval": "day"}]), "day"),
        (lambda module, optimizer: {"optimizer": optimizer, "lr_scheduler": 5}, "5|int"),
        (lambda module, optimizer: torch.optim.SGD, "SGD|type"),
        (lambda module, optimizer: lambda: optimizer, "function|lambda"),
    ],
)
def test_rubbish_is_refused_naming_it_and_what_is_allowed(tmp_path: Path, rubbish: Any, named: str) -> None:
    module = Configured(rubbish)
    before = module.layer.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=named) as caught:
        quiet_trainer(tmp_path).fit(module, regression_loader(1))
    assert "configure_optimizers" in str(caught.value)
    assert torch.equal(module.layer.weight, before)


def test_unknown_keys_of_a_scheduler_config_are_named(tmp_path: Path) -> None:
    def configure(module: Any, optimizer: Any) -> Any:
        return [optimizer], [{"scheduler": halving(optimizer), "intervall": "step"}]

    with pytest.raises(MisconfigurationException, match=r"(?s)(?=.*intervall)(?=.*interval\b)(?=.*frequency)"):
        rates(tmp_path, configure)


def test_several_optimizers_want_manual_optimization(tmp_path: Path) -> None:
    def configure(module: Any, optimizer: Any) -> Any:
        return [optimizer, torch.optim.SGD(module.parameters(), lr=1.0)]

    with pytest.raises((MisconfigurationException, RuntimeError), match="automatic_optimization"):
        rates(tmp_path, configure)


def test_a_tuple_of_dictionaries_serves_manual_optimization(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Manual(Configured):
        def __init__(self, configure: Any) -> None:
            super().__init__(configure)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            first.step()
            schedulers = self.lr_schedulers()
            schedulers[0].step()
            seen.append((first.param_groups[0]["lr"], second.param_groups[0]["lr"]))

    def configure(module: Any, optimizer: Any) -> Any:
        other = torch.optim.SGD(module.parameters(), lr=3.0)
        return (
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer)}},
            {"optimizer": other, "lr_scheduler": halving(other)},
        )

    quiet_trainer(tmp_path).fit(Manual(configure), regression_loader(2))
    assert seen == [(0.5, 3.0), (0.25, 3.0)]


def test_lr_schedulers_of_manual_optimization_are_left_to_the_user(tmp_path: Path) -> None:
    class Manual(Configured):
        def __init__(self, configure: Any) -> None:
            super().__init__(configure)
            self.automatic_optimization = False

    callback = LearningRates()
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[callback])
    module: pl.LightningModule = Manual(lambda module, optimizer: ([optimizer], [halving(optimizer)]))
    trainer.fit(module, regression_loader(1))
    assert callback.values == [1.0, 1.0, 1.0]


def test_reduce_on_plateau_needs_no_monitor_where_the_user_steps_it(tmp_path: Path) -> None:
    class Stepping(Configured):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.lr_schedulers().step(1.0)

    callback = LearningRates()
    module = Stepping(lambda _, optimizer: ([optimizer], [ReduceLROnPlateau(optimizer, factor=0.5, patience=0)]))
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, regression_loader(3))

    assert callback.values == [1.0, 1.0, 0.5]
