"""Everything a run does, on a device that is not the CPU: one simulated by an installed package, known here by name."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from sim_programs import Net, loader, net, trainer
from torch import Tensor, nn

import lightlite as pl
from lightlite.accelerators import AcceleratorRegistry
from lightlite.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightlite.interfaces import Accelerator
from lightlite.loggers import CSVLogger
from lightlite.plugins import AsyncCheckpointIO

SIM = AcceleratorRegistry.get("sim")
pytestmark = [
    pytest.mark.skipif(not SIM.is_available(), reason=str(SIM.unavailable_reason())),
    pytest.mark.filterwarnings("ignore:.*has a validation_step, but there is no val loader"),
]
CPU = torch.device("cpu")


@pytest.fixture
def device() -> torch.device:
    return SIM.get_parallel_devices([0])[0]


def curve(module: Net) -> list[float]:
    return [loss.item() for loss in module.losses]


def whole_run(accelerator: str, **overrides: Any) -> dict[str, Any]:
    """What fit, validate, test and predict come to."""
    module, run = net(), trainer(accelerator=accelerator, **overrides)
    run.fit(module, loader(), loader(16))
    return {
        "losses": curve(module),
        "epoch": run.callback_metrics["loss_epoch"].item(),
        "validate": run.validate(module, loader(16), verbose=False),
        "test": run.test(module, loader(16), verbose=False),
        "predict": torch.cat(run.predict(module, loader(16))).tolist(),
        "weights": [value.flatten().tolist() for value in module.state_dict().values()],
    }


def flat(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


def test_a_run_gives_the_numbers_of_the_cpu() -> None:
    on_cpu, on_sim = whole_run("cpu"), whole_run("sim")
    assert len(on_sim["losses"]) == 8
    for part, expected in on_cpu.items():
        assert list(flat(on_sim[part])) == pytest.approx(list(flat(expected)), abs=1e-6), part


def digits_curve(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "examples"))
    import digits

    class Watched(digits.ConvNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.detach())
            return loss

    losses: list[Tensor] = []
    pl.seed_everything(0, verbose=False)
    model, run = Watched(dropout=0.0), trainer(accelerator=accelerator, num_sanity_val_steps=0)
    run.fit(model, datamodule=digits.Digits())
    return [loss.item() for loss in losses]


def test_the_digits_example_has_the_loss_curve_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, on_sim = (digits_curve(accelerator, monkeypatch) for accelerator in ("cpu", "sim"))
    assert len(on_sim) == 38
    assert on_sim[-1] < 0.7 * on_sim[0]
    assert on_sim == pytest.approx(on_cpu, abs=1e-6)


def test_the_run_is_on_the_device_and_its_results_are_in_the_hosts_memory() -> None:
    seen = set()

    class Watching(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.update(str(tensor.device) for tensor in (*batch, *self.parameters(), *self.buffers()))
            loss = super().training_step(batch, batch_idx)
            seen.add(str(loss.device))
            seen.add(str(self.device))
            return loss

    module, run = Watching(), trainer()
    parameters = list(module.parameters())
    run.fit(module, loader())
    assert seen == {"sim:0"}
    assert all(mine is theirs for mine, theirs in zip(parameters, module.parameters(), strict=True))
    assert {value.device for value in (*module.parameters(), *module.buffers())} == {CPU}
    assert {prediction.device for prediction in run.predict(module, loader())} == {CPU}


def test_the_name_is_all_that_a_script_needs(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, lightlite as pl\n"
        "from lightlite.demos import BoringModel\n"
        "trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,\n"
        "                     enable_model_summary=False)\n"
        "trainer.fit(BoringModel())\n"
        "print(trainer.strategy.root_device)\n"
    )
    command = [sys.executable, "-m", "lightlite.launch", "--accelerator", "sim", "--devices", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "sim:0"


PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "16-true": (torch.float16, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_computes_in_its_format(precision: str) -> None:
    computed = set()

    class Watching(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            computed.add(self.layers[0](batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, run = Watching(), trainer(precision=precision, max_epochs=8)
    run.fit(module, loader())
    kept, formed = PRECISIONS[precision]
    assert computed == {formed}
    assert {parameter.dtype for parameter in module.parameters()} == {kept}
    losses = curve(module)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    if run.precision_plugin.scaler is not None:
        assert run.precision_plugin.scaler.get_scale() > 0


CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "model_checkpoint": lambda: ModelCheckpoint(monitor="val_loss", save_last=True, save_top_k=2),
    "early_stopping": lambda: EarlyStopping("val_loss", patience=5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "ema": EMAWeightAveraging,
    "weight_averaging": WeightAveraging,
    "accumulation": lambda: GradientAccumulationScheduler({0: 2}),
    "timer": lambda: Timer(timedelta(hours=1)),
    "spike": SpikeDetection,
    "learning_rate": LearningRateMonitor,
    "on_exception": lambda: OnExceptionCheckpoint("broken"),
    "rich_bar": RichProgressBar,
    "tqdm_bar": TQDMProgressBar,
    "summary": ModelSummary,
    "rich_summary": RichModelSummary,
    "throughput": lambda: ThroughputMonitor(lambda batch: len(batch[0])),
    "learning_rate_finder": lambda: LearningRateFinder(num_training_steps=8, update_attr=False),
}


def fit_with(accelerator: str, callback: pl.Callback) -> tuple[list[float], list[float]]:
    module = net()
    module.flops_per_batch = 1
    run = trainer(
        callback,
        accelerator=accelerator,
        logger=CSVLogger(accelerator),
        enable_progress_bar="bar" in type(callback).__name__.lower(),
        enable_model_summary="summary" in type(callback).__name__.lower(),
    )
    run.fit(module, loader(), loader(16))
    return curve(module), [value for tensor in module.state_dict().values() for value in tensor.flatten().tolist()]


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_callback_does_on_the_device_what_it_does_on_the_cpu(name: str) -> None:
    on_cpu, on_sim = fit_with("cpu", CALLBACKS[name]()), fit_with("sim", CALLBACKS[name]())
    assert on_sim[0] == pytest.approx(on_cpu[0], abs=1e-6)
    assert on_sim[1] == pytest.approx(on_cpu[1], abs=1e-6)


def test_device_stats_are_those_of_the_accelerator() -> None:
    seen: list[float] = []

    class Keeps(DeviceStatsMonitor):
        def _figures(self, trainer: Any) -> dict[str, float]:
            figures = super()._figures(trainer)
            seen.append(figures["process_memory_bytes"])
            assert "cpu_memory_used_bytes" in figures
            return figures

    run = trainer(Keeps(cpu_stats=True), logger=CSVLogger("logs"), max_epochs=1)
    module = net()
    run.fit(module, loader())
    weights = sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
    assert min(seen) >= weights


def interrupted(path: Path, accelerator: str, plugins: Any = None) -> Net:
    """Trained for an epoch and a half, with a window of accumulation open, and saved there."""

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 0):
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    module = net()
    settings = {"accelerator": accelerator, "accumulate_grad_batches": 2, "max_epochs": 3, "plugins": plugins}
    trainer(Saves(), **settings).fit(module, loader())
    return module


@pytest.mark.parametrize("plugins", [None, AsyncCheckpointIO], ids=["at_once", "async"])
@pytest.mark.parametrize(("saved_on", "resumed_on"), [("sim", "sim"), ("sim", "cpu"), ("cpu", "sim")])
def test_a_resumed_run_goes_on_as_if_uninterrupted(
    saved_on: str, resumed_on: str, plugins: Any, tmp_path: Path
) -> None:
    path = tmp_path / "half.ckpt"
    interrupted(path, saved_on, plugins and plugins())
    whole, resumed = net(), net()
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    trainer(**settings).fit(whole, loader())
    trainer(accelerator=resumed_on, **settings).fit(resumed, loader(), ckpt_path=path)
    assert curve(resumed) == pytest.approx(curve(whole)[5:], abs=1e-6)


def test_a_checkpoint_holds_no_tensor_of_the_device(tmp_path: Path) -> None:
    interrupted(tmp_path / "half.ckpt", "sim")
    program = (
        "import sys, torch\n"
        "read = torch.load(sys.argv[1], weights_only=True)\n"
        "def devices(value):\n"
        "    if isinstance(value, torch.Tensor): yield value.device.type\n"
        "    elif isinstance(value, dict): yield from (d for v in value.values() for d in devices(v))\n"
        "    elif isinstance(value, (list, tuple)): yield from (d for v in value for d in devices(v))\n"
        "print(set(devices(read)), 'gradients' in read['lightlite']['window'][0], 'sim_accelerator' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "half.ckpt")], capture_output=True, text=True)
    assert done.stdout == "{'cpu'} True False\n", done.stderr


def test_the_devices_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    class Noisy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            noise = torch.rand(1, device=self.device)
            self.losses.append(noise)
            return super().training_step(batch, batch_idx) + 0 * noise.sum()

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, resumed = Noisy(), Noisy()
    trainer(Saves(), max_epochs=2).fit(whole, loader(shuffle=False))
    noise = curve(whole)[::2]
    assert len(set(noise)) == 8
    torch.rand(5, device=SIM.get_parallel_devices([0])[0])
    trainer(max_epochs=2).fit(resumed, loader(shuffle=False), ckpt_path=tmp_path / "0.ckpt")
    assert curve(resumed)[::2] == noise[4:]


def test_the_device_draws_from_a_generator_of_its_own(device: torch.device) -> None:
    torch.manual_seed(7)
    host, first = torch.get_rng_state(), torch.rand(3, device=device)
    assert torch.equal(torch.get_rng_state(), host)
    assert not torch.equal(torch.rand(3, device=device).cpu(), first.cpu())
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3, device=device).cpu(), first.cpu())


def test_gradients_are_clipped_and_scaled_on_the_device() -> None:
    for options in (
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"detect_anomaly": True},
    ):
        on_cpu, on_sim = net(), net()
        trainer(accelerator="cpu", **options).fit(on_cpu, loader())
        trainer(accelerator="sim", **options).fit(on_sim, loader())
        assert curve(on_sim) == pytest.approx(curve(on_cpu), abs=1e-6), options


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Any


class Custom:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def to(self, device: torch.device) -> Custom:
        return Custom(self.value.to(device))


class BatchOf(pl.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.layer(torch.ones(2, device=self.device)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_nest_goes_to_the_device_with_what_it_shares() -> None:
    x = torch.ones(2)
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    batch = {"pair": Pair(x, [x, "text", None]), "again": x, "custom": Custom(x), "packed": packed}
    module = BatchOf()
    trainer(max_epochs=1).fit(module, [batch])
    (moved,) = module.batches
    assert moved["again"].device.type == "sim"
    assert moved["pair"].left is moved["again"] is moved["pair"].right[0]
    assert moved["pair"].right[1:] == ["text", None]
    assert (moved["custom"].value.device.type, moved["packed"].data.device.type) == ("sim", "sim")
    assert batch["again"] is x
    assert batch["pair"].left.device == CPU


def test_what_is_there_already_is_not_copied(device: torch.device) -> None:
    batch = [torch.ones(2, device=device), {"x": torch.ones(1, device=device)}]
    module = BatchOf()
    trainer(max_epochs=1).fit(module, [batch])
    assert module.batches[0] is batch
    on_cpu, plain = BatchOf(), [torch.ones(2)]
    trainer(accelerator="cpu", max_epochs=1).fit(on_cpu, [plain])
    assert on_cpu.batches[0] is plain


def test_the_transfer_hooks_are_called_around_the_move() -> None:
    calls = []

    class Hooked(BatchOf):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append(("before", batch.device.type, dataloader_idx))
            return batch + 1

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            calls.append(("transfer", batch.device.type, str(device)))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append(("after", batch.device.type, dataloader_idx))
            return batch * 10

    module = Hooked()
    trainer(max_epochs=1).fit(module, [torch.ones(2)])
    assert calls == [("before", "cpu", 0), ("transfer", "cpu", "sim:0"), ("after", "sim", 0)]
    assert module.batches[0].tolist() == [20, 20]


def test_an_overridden_transfer_is_all_that_moves_a_batch() -> None:
    class Stays(BatchOf):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch

    module = Stays()
    trainer(max_epochs=1).fit(module, [torch.ones(2)])
    assert module.batches[0].device == CPU


def test_copies_of_a_module_stay_on_the_device(device: torch.device) -> None:
    module = net()
    SIM().move_module(module, device)
    twin = copy.deepcopy(module)
    assert {value.device for value in twin.state_dict().values()} == {device}
    with torch.no_grad():
        twin.scale.add_(1)
    assert not torch.equal(twin.scale, module.scale)
    again = net().to(device)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.scale, module.scale)


def test_two_processes_with_a_device_each_train_as_two_on_the_cpu(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from sim_programs import loader, net, trainer\n"
        "for accelerator in ('cpu', 'sim'):\n"
        "    module, run = net(), trainer(accelerator=accelerator, devices=2)\n"
        "    run.fit(module, loader(batch_size=4), loader(16, 4))\n"
        "    tested = run.test(module, loader(16, 4), verbose=False)\n"
        "    predicted = torch.cat(run.predict(module, loader(16, 4)))\n"
        "    print(run.strategy.root_device, run.world_size, [loss.item() for loss in module.losses], tested,\n"
        "          predicted.tolist(), sep='; ')\n"
    )
    environment = {**os.environ, "SIM_DEVICES": "2"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    on_cpu, on_sim = (line.split("; ") for line in done.stdout.splitlines()[-2:])
    assert (on_cpu[:2], on_sim[:2]) == (["cpu", "2"], ["sim:0", "2"])
    for mine, theirs in zip(on_sim[2:], on_cpu[2:], strict=True):
        assert list(flat(eval(mine))) == pytest.approx(list(flat(eval(theirs))), abs=1e-6)


def _move_parameters_only(self: Accelerator, module: nn.Module, device: torch.device) -> None:
    buffers = {part: dict(part._buffers) for part in module.modules()}
    _moves(self, module, device)
    for part, kept in buffers.items():
        part._buffers.update(kept)


def _load_state_as_it_is(self: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state.update({parameters[index]: value for index, value in state["state"].items()})


_moves = SIM.move_module
_single = "lightlite.plugins.single.SingleDeviceStrategy"
FORGOTTEN: dict[str, tuple[Any, str, Any]] = {
    "batch": (SIM, "batch_mover", lambda self, device: None),
    "module": (SIM, "move_module", lambda self, module, device: None),
    "buffers": (SIM, "move_module", _move_parameters_only),
    "optimizer state": (pl.strategies.SingleDeviceStrategy, "load_optimizer_state", _load_state_as_it_is),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_forgotten_move_fails(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    interrupted(path, "sim")
    trainer(accumulate_grad_batches=2, max_epochs=3).fit(net(), loader(), ckpt_path=path)
    monkeypatch.setattr(*FORGOTTEN[what])
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device, but found cpu, sim:0"):
        trainer(accumulate_grad_batches=2, max_epochs=3).fit(net(), loader(), ckpt_path=path)


def test_the_optimizers_state_leaves_the_device_with_the_module() -> None:
    run, module = trainer(max_epochs=1), net()
    run.fit(module, loader())
    states = run.optimizers[0].state.values()
    assert {value.device for state in states for value in state.values()} == {CPU}
