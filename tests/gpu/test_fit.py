"""Whole runs on a GPU: the numbers of the CPU, and all that has to move there and back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightlite as pl
from lightlite.callbacks import Callback, DeviceStatsMonitor
from lightlite.errors import MisconfigurationException
from lightlite.loggers import CSVLogger
from lightlite.registry import AcceleratorRegistry

from .nets import QUIET, Net, fit, loader

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loss_curve_is_that_of_the_cpu(gpu: str, workers: int) -> None:
    here, there = Net(), Net()
    fit(here, "cpu", workers=workers)
    fit(there, gpu, workers=workers)
    assert there.losses[0].device.type == gpu
    assert there.curve == pytest.approx(here.curve, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_half_precision_trains_nearly_as_well(gpu: str, precision: str) -> None:
    if precision == "16-true" and gpu == "cpu":
        pytest.skip("slow")
    exact, half = Net(), Net()
    fit(exact, gpu, max_epochs=5)
    trainer = fit(half, gpu, max_epochs=5, precision=precision)
    assert half.curve[-1] < 0.8 * half.curve[0]
    if precision.endswith("mixed"):
        assert half.curve[-1] == pytest.approx(exact.curve[-1], abs=0.1)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert (trainer.precision_plugin.scaler is not None) == (precision == "16-mixed")


def test_double_precision_is_computed_or_refused(gpu: str) -> None:
    if AcceleratorRegistry.get(gpu).float64:
        net = Net()
        fit(net, gpu, precision="64-true", max_epochs=1)
        assert net.losses[0].dtype == torch.float64
    else:
        with pytest.raises(MisconfigurationException, match="no double precision"):
            fit(Net(), gpu, precision="64-true")


def test_the_module_is_in_the_hosts_memory_afterwards_and_validated_values_are_those_of_the_cpu(gpu: str) -> None:
    net = Net()
    trainer = fit(net, gpu, max_epochs=1)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}
    scores = [
        pl.Trainer(accelerator=accelerator, devices=1, **QUIET).validate(net, loader(), verbose=False)[0]
        for accelerator in ("cpu", gpu)
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert trainer.callback_metrics["val_loss"] == pytest.approx(scores[0]["val_loss"], rel=1e-3)


def test_predictions_come_back_in_the_hosts_memory_and_in_order(gpu: str) -> None:
    net = Net().eval()
    predictions = pl.Trainer(accelerator=gpu, devices=1, **QUIET).predict(net, loader(2))
    expected = pl.Trainer(accelerator="cpu", devices=1, **QUIET).predict(net, loader())
    assert {batch.device.type for batch in predictions} == {"cpu"}
    torch.testing.assert_close(torch.cat(predictions), torch.cat(expected), rtol=1e-3, atol=1e-4)


class Leave(Callback):
    """Saves after a step, and leaves."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_goes_on_bit_for_bit_with_the_devices_own_random_numbers_and_its_scaler(
    gpu: str, tmp_path: Path, precision: str, workers: int
) -> None:
    settings: dict[str, Any] = {"precision": precision, "workers": workers}
    if gpu == "cuda":
        settings["deterministic"] = True
    whole, begun, rest = Net(dropout=0.5), Net(dropout=0.5), Net(dropout=0.5)
    try:
        trainer = fit(whole, gpu, **settings)
        path = tmp_path / "kept.ckpt"
        with pytest.raises(KeyboardInterrupt):
            fit(begun, gpu, callbacks=[Leave(11, path)], **settings)
        resumed = fit(rest, gpu, ckpt_path=str(path), **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert begun.curve + rest.curve == whole.curve
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))
    if precision == "16-mixed":
        assert resumed.precision_plugin.state_dict() == trainer.precision_plugin.state_dict()


def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu(gpu: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.ckpt"
    begun, rest = Net(), Net()
    with pytest.raises(KeyboardInterrupt):
        fit(begun, gpu, callbacks=[Leave(11, path)])
    fit(rest, "cpu", ckpt_path=str(path))
    assert len(begun.curve + rest.curve) == 24


def test_double_precision_batches_arrive_in_what_the_device_has(gpu: str) -> None:
    class Doubles(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert batch[0].dtype == (torch.float64 if AcceleratorRegistry.get(gpu).float64 else torch.float32)
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    x = torch.randn(8, 16, dtype=torch.float64)
    trainer = pl.Trainer(accelerator=gpu, devices=1, max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(Doubles(), [(x, torch.zeros(8, dtype=torch.int64))])


def test_the_devices_figures_are_logged(gpu: str, tmp_path: Path) -> None:
    fit(Net(), gpu, max_epochs=1, logger=CSVLogger(tmp_path), callbacks=[DeviceStatsMonitor()], log_every_n_steps=1)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row]
    memory = [float(v) for row in rows for k, v in row.items() if v and k.endswith("process_memory_bytes")]
    assert memory
    assert min(memory) > 0
