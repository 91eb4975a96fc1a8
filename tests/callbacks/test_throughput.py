from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightlite as pl
from lightlite.callbacks import ThroughputMonitor
from lightlite.errors import MisconfigurationException
from lightlite.plugins.peak_flops import of_gpu
from lightlite.utilities import ThroughputMonitor as FabricMonitor
from lightlite.utilities import measure_flops
from lightlite.utilities.throughput import Throughput, get_available_flops

from .programs import Net, loader, trainer
from .test_device_stats import Rows

TOTALS = {"time", "batches", "samples", "lengths"}
RATES = {"batches_per_sec", "samples_per_sec", "items_per_sec", "flops_per_sec"}


def test_rates_are_counted_over_the_window() -> None:
    throughput = Throughput(available_flops=1000, world_size=2, window_size=3)
    for number in range(1, 5):
        throughput.update(time=2.0 * number, batches=number, samples=4 * number, lengths=40 * number, flops=100)
        if number == 2:
            assert throughput.compute() == {"time": 4.0, "batches": 2, "samples": 8, "lengths": 80}
    of_device = {"batches_per_sec": 0.5, "samples_per_sec": 2.0, "items_per_sec": 20.0, "flops_per_sec": 50.0}
    assert throughput.compute() == {
        **{"time": 8.0, "batches": 4, "samples": 16, "lengths": 160, "device/mfu": 0.05},
        **{f"device/{name}": rate for name, rate in of_device.items()},
        **{name: 2 * rate for name, rate in of_device.items()},
    }
    throughput.reset()
    assert throughput.compute() == {}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"time": 1.0, "batches": 2, "samples": 2}, "time=1.0 after 1.0"),
        ({"time": 2.0, "batches": 1, "samples": 2}, "batches=1 after 1"),
        ({"time": 2.0, "batches": 2, "samples": 1}, "samples=1 is less than batches=2"),
        ({"time": 2.0, "batches": 2, "samples": 2, "lengths": 1}, "lengths=1 is less than samples=2"),
    ],
)
def test_totals_that_cannot_be_are_refused(second: dict[str, Any], message: str) -> None:
    throughput = Throughput()
    throughput.update(time=1.0, batches=1, samples=1)
    with pytest.raises(ValueError, match=message):
        throughput.update(**second)


@pytest.mark.parametrize("options", [{"world_size": 0}, {"window_size": 1}])
def test_windows_and_worlds_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(MisconfigurationException, match=f"{name}={value}"):
        Throughput(**options)


def test_operations_are_counted_without_computing() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(32, 8), torch.randn(4, 32)
    forward = 2 * 4 * 32 * 8
    assert measure_flops(model, lambda: model(x)) == forward
    assert measure_flops(model, lambda: model(x), torch.Tensor.sum) == 2 * forward


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA H200", torch.float64, 33.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla V100S-PCIE-32GB", torch.float16, 130e12),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float32, 40e12),
    ],
)
def test_peaks_are_those_of_dense_matrices(name: str, dtype: torch.dtype, peak: float) -> None:
    assert of_gpu(name, dtype) == peak


def test_float32_counts_as_what_it_is_multiplied_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert of_gpu("NVIDIA A100-PCIE-40GB", torch.float32) == 156e12


@pytest.mark.parametrize(
    ("name", "message"), [("NVIDIA Unheard-of", "'NVIDIA Unheard-of' are not known"), ("Tesla T4", "no hardware for")]
)
def test_a_peak_that_is_not_known_is_none(name: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert of_gpu(name, torch.bfloat16) is None


def test_a_devices_peak_is_asked_of_its_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert get_available_flops(torch.device("cuda"), torch.float64) == 33.5e12
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
    assert get_available_flops(torch.device("meta"), torch.float32) is None


def test_a_loop_of_ones_own_is_logged() -> None:
    rows = Rows()
    monitor = FabricMonitor(pl.Fabric(accelerator="cpu", devices=1, loggers=rows), window_size=2)
    assert monitor.compute_and_log() == {}
    for number in (1, 2):
        monitor.update(time=0.5 * number, batches=number, samples=3 * number)
        metrics = monitor.compute_and_log(step=None if number == 1 else 7)
    totals = {"time": 1.0, "batches": 2, "samples": 6}
    assert metrics == {**totals, "device/batches_per_sec": 2.0, "device/samples_per_sec": 6.0}
    assert {name: steps for name, steps in rows.steps.items() if name != "epoch"} == {
        **{name: [1, 7] for name in totals},
        **{name: [7] for name in ("device/batches_per_sec", "device/samples_per_sec")},
    }


class Counted(Net):
    flops_per_batch = 100


def samples(batch: Tensor) -> int:
    return len(batch)


def items(batch: Tensor) -> int:
    return batch.numel()


def test_every_loop_is_logged_at_its_log_points() -> None:
    rows = Rows()
    monitor = ThroughputMonitor(samples, items, window_size=2)
    options: dict[str, Any] = {"logger": rows, "log_every_n_steps": 2, "max_epochs": 2, "num_sanity_val_steps": 2}
    run = trainer(monitor, **options)
    run.fit(Counted(), loader(4), loader(2))
    run.test(Counted(), loader(4), verbose=False)
    run.predict(Counted(), loader(2))
    names = TOTALS | {f"device/{rate}" for rate in RATES}
    stages = ("train", "validate", "test", "predict")
    logged = {name: steps for name, steps in rows.steps.items() if name.split("/")[0] in stages}
    assert set(logged) == {f"{stage}/{name}" for stage in stages for name in names}
    at = {stage: logged[f"{stage}/batches"] for stage in stages}
    assert at == {"train": [1, 3, 5, 7], "validate": [2, 4], "test": [2, 4], "predict": [2]}
    assert monitor._loops.keys() == {"predict"}


def test_only_whole_optimizer_steps_are_logged() -> None:
    rows = Rows()
    monitor = ThroughputMonitor(samples, window_size=2)
    run = trainer(monitor, logger=rows, log_every_n_steps=1, accumulate_grad_batches=3, max_epochs=1)
    run.fit(Counted(), loader(6), loader(1))
    assert rows.steps["train/batches"] == [0, 1]


def test_validations_do_not_slow_training_down() -> None:
    class Slow(Counted):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            time.sleep(0.3)

    monitor = ThroughputMonitor(samples, window_size=2)
    run = trainer(monitor, logger=Rows(), val_check_interval=1, max_epochs=1)
    run.fit(Slow(), loader(3), loader(1))
    assert 0 < run.logged_metrics["train/time"] < 0.3
    assert run.logged_metrics["validate/time"] >= 0.3


def test_with_several_ranks_the_rates_of_all_together_are_logged_too() -> None:
    rows = Rows()
    run = trainer(ThroughputMonitor(samples, window_size=2), logger=rows, devices=2, max_epochs=1)
    try:
        run.fit(Counted(), loader(8), loader(1))
    finally:
        run.close()
    rates = {"batches_per_sec", "samples_per_sec", "flops_per_sec"}
    wanted = {f"train/{name}" for rate in rates for name in (rate, f"device/{rate}")}
    assert wanted <= set(rows.steps)


def test_a_module_without_operations_is_named() -> None:
    with pytest.warns(UserWarning, match="Net has no flops_per_batch"):
        trainer(ThroughputMonitor(samples), logger=Rows(), max_epochs=1).fit(Net(), loader(1), loader(1))


def test_arguments_are_checked_as_it_is_made() -> None:
    with pytest.raises(TypeError, match="window"):
        ThroughputMonitor(samples, window=3)
    with pytest.raises(MisconfigurationException, match="window_size=1"):
        ThroughputMonitor(samples, window_size=1)
