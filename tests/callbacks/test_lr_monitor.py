from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightlite.callbacks import LearningRateMonitor
from lightlite.errors import MisconfigurationException
from lightlite.loggers.logger import DummyLogger

from .programs import Net, loader, trainer


class Rows(DummyLogger):
    """Keeps the rows that hold a learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        rates = {name: round(float(value), 6) for name, value in metrics.items() if "lr" in name or "rate" in name}
        if rates:
            self.rows.append((step, rates))


class Tuned(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.other = torch.nn.Linear(1, 1)
        self.kind = kind
        self.automatic_optimization = kind != "two"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.other(self.layer(batch)).pow(2).mean()
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.kind == "plain":
            return SGD(self.parameters(), 0.1, momentum=0.5, weight_decay=0.01)
        if self.kind == "by step":
            optimizer = Adam(self.parameters(), 0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), "interval": "step"}}
        if self.kind == "groups":
            groups = [{"params": self.layer.parameters(), "name": "enc"}, {"params": self.other.parameters()}]
            optimizer = SGD(groups, 0.1)
            return [optimizer], [StepLR(optimizer, 1)]
        if self.kind == "named":
            optimizer = SGD(self.parameters(), 0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), "name": "my rate"}}
        if self.kind == "same names":
            return SGD([{"params": [p], "name": "n"} for p in self.parameters()], 0.1)
        return [SGD(self.layer.parameters(), 0.1), SGD(self.other.parameters(), 0.2)]


def rows(kind: str, interval: Any = None, **options: Any) -> list[tuple[int | None, dict[str, float]]]:
    logger = Rows()
    monitor = LearningRateMonitor(interval, **options)
    run = trainer(monitor, logger=logger, max_epochs=2, log_every_n_steps=2, limit_val_batches=0)
    run.fit(Tuned(kind), loader(), loader(1))
    return logger.rows


# What PyTorch Lightning 2.6.6 logs.
@pytest.mark.parametrize(
    ("kind", "interval", "expected"),
    [
        ("plain", None, [(step, {"lr-SGD": 0.1}) for step in (0, 1, 3, 4, 5, 7)]),
        ("plain", "step", [(step, {"lr-SGD": 0.1}) for step in (1, 3, 5, 7)]),
        ("plain", "epoch", [(step, {"lr-SGD": 0.1}) for step in (0, 4)]),
        (
            "by step",
            None,
            [(1, {"lr-Adam": 0.01}), (3, {"lr-Adam": 1e-4}), (5, {"lr-Adam": 1e-6}), (7, {"lr-Adam": 0})],
        ),
        ("by step", "epoch", [(0, {"lr-Adam": 0.1}), (4, {"lr-Adam": 1e-5})]),
        ("groups", None, [(0, {"lr-SGD/enc": 0.1, "lr-SGD/pg2": 0.1}), (4, {"lr-SGD/enc": 0.01, "lr-SGD/pg2": 0.01})]),
        ("named", None, [(0, {"my rate": 0.1}), (4, {"my rate": 0.01})]),
        ("two", "epoch", [(0, {"lr-SGD": 0.1, "lr-SGD-1": 0.2}), (4, {"lr-SGD": 0.1, "lr-SGD-1": 0.2})]),
    ],
)
def test_rates_are_logged_under_lightnings_names_and_steps(kind: str, interval: Any, expected: Any) -> None:
    assert rows(kind, interval) == expected


def test_momentum_and_weight_decay_are_logged_where_asked_for() -> None:
    expected = {"lr-SGD": 0.1, "lr-SGD-momentum": 0.5, "lr-SGD-weight_decay": 0.01}
    assert rows("plain", "epoch", log_momentum=True, log_weight_decay=True) == [(0, expected), (4, expected)]


def test_parameter_groups_of_one_name_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="share a name: n, n"):
        rows("same names")


def test_a_trainer_without_a_logger_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="has no logger"):
        trainer(LearningRateMonitor()).fit(Tuned("plain"), loader(), loader(1))


def test_another_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'step', 'epoch' or None"):
        LearningRateMonitor("batch")  # type: ignore[arg-type]


def test_where_no_step_is_logged_no_rate_is() -> None:
    logged = Rows()
    run = trainer(LearningRateMonitor("step"), logger=logged, log_every_n_steps=0, max_epochs=1)
    run.fit(Tuned("plain"), loader(2), loader(1))
    assert logged.rows == []
