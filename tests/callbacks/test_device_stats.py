from __future__ import annotations

from typing import Any

import pytest
import torch

from lightlite.callbacks import DeviceStatsMonitor
from lightlite.errors import MisconfigurationException
from lightlite.loggers import Logger
from lightlite.plugins.cpu import CPUAccelerator

from .programs import Net, loader, trainer


class Rows(Logger):
    """Keeps the steps at which each value was logged."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int | None]] = {}

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            assert isinstance(value, (int, float)), name
            self.steps.setdefault(name, []).append(step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, callback: str) -> dict[str, list[int | None]]:
        return {name: steps for name, steps in self.steps.items() if name.startswith(callback)}


class Simulated(CPUAccelerator):
    """The CPU in the place of a device with figures of its own."""

    name = "simulated"

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("meta")]

    def setup_device(self, device: torch.device) -> None:
        pass

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        return {"utilization_percent": 7.0}


def figures() -> list[str]:
    return list(CPUAccelerator().get_device_stats(torch.device("cpu")))


def test_figures_are_logged_around_batches_at_log_points() -> None:
    rows = Rows()
    run = trainer(DeviceStatsMonitor(), logger=rows, log_every_n_steps=3, max_epochs=2, num_sanity_val_steps=3)
    run.fit(Net(), loader(4), loader(3))
    run.test(Net(), loader(3), verbose=False)
    logged = rows.of("DeviceStatsMonitor")
    hooks = [f"on_{stage}_batch_{when}" for stage in ("train", "validation", "test") for when in ("start", "end")]
    assert set(logged) == {f"DeviceStatsMonitor.{hook}/{figure}" for hook in hooks for figure in figures()}
    at = {hook: logged[f"DeviceStatsMonitor.{hook}/memory_percent"] for hook in hooks}
    assert at["on_train_batch_start"] == at["on_train_batch_end"] == [2, 5]
    assert at["on_validation_batch_start"] == at["on_validation_batch_end"] == [3, 7]
    assert at["on_test_batch_start"] == at["on_test_batch_end"] == [8]


@pytest.mark.parametrize(("cpu_stats", "logged"), [(None, True), (True, True), (False, False)])
def test_the_cpus_figures_can_be_left_out(cpu_stats: bool | None, logged: bool) -> None:
    rows = Rows()
    trainer(DeviceStatsMonitor(cpu_stats), logger=rows, max_epochs=1).fit(Net(), loader(1), loader(1))
    assert bool(rows.of("DeviceStatsMonitor")) is logged


def test_the_cpus_figures_can_stand_beside_the_devices() -> None:
    run = trainer(logger=Rows())
    run.hardware.accelerator = Simulated()
    run.strategy.root_device = torch.device("meta")
    assert DeviceStatsMonitor()._figures(run) == {"utilization_percent": 7.0}
    both = DeviceStatsMonitor(cpu_stats=True)._figures(run)
    assert list(both) == ["utilization_percent", *(f"cpu_{name}" for name in figures())]
    assert both["utilization_percent"] == 7.0


def test_nothing_is_logged_where_nothing_is_to_be_logged() -> None:
    rows = Rows()
    trainer(DeviceStatsMonitor(), logger=rows, log_every_n_steps=0, max_epochs=1).fit(Net(), loader(2), loader(1))
    assert rows.of("DeviceStatsMonitor") == {}


def test_a_trainer_without_a_logger_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="DeviceStatsMonitor has nowhere to log to"):
        trainer(DeviceStatsMonitor(), max_epochs=1).fit(Net(), loader(1), loader(1))
