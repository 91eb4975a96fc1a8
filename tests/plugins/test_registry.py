"""Plugins by name: registered by hand, declared by installed packages, broken ones among them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightlite as pl
from lightlite.errors import MisconfigurationException, UnknownPluginError
from lightlite.interfaces import Accelerator
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.ddp import DDPStrategy
from lightlite.registry import AcceleratorRegistry, Registry, StrategyRegistry


class Elsewhere(CPUAccelerator):
    """A device of another machine"""

    name = "elsewhere"

    @staticmethod
    def is_available() -> bool:
        return False


@pytest.fixture
def accelerators() -> Registry[Accelerator]:
    return Registry("accelerator", "lightlite.plugins:ACCELERATORS", group="lightlite.accelerators")


def install(folder: Path, *declarations: str, group: str = "lightlite.accelerators") -> None:
    """What pip leaves of a package that declares entry points: "name = module:Class"."""
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *declarations]) + "\n")


def test_a_class_is_registered_by_a_call_or_a_decorator(accelerators: Registry[Accelerator]) -> None:
    assert accelerators.register("elsewhere", Elsewhere) is Elsewhere

    @accelerators.register("here", description="this machine's")
    class Here(CPUAccelerator):
        name = "here"

    assert accelerators.get("here") is Here
    assert isinstance(accelerators.create("here"), Here)
    assert accelerators.describe("here") == "this machine's"
    assert accelerators.describe("elsewhere") == "A device of another machine"
    assert {"elsewhere", "here", "cpu"} <= set(accelerators)


def test_a_name_that_is_taken_is_replaced_only_when_asked(accelerators: Registry[Accelerator]) -> None:
    for name in ("cpu", "sim", "auto"):
        with pytest.raises(UnknownPluginError, match=f"accelerator '{name}' is registered already; pass override=True"):
            accelerators.register(name, Elsewhere)
    accelerators.register("cpu", Elsewhere, override=True)
    assert accelerators.get("cpu") is Elsewhere


def test_a_strategy_is_made_with_the_arguments_it_was_registered_with() -> None:
    strategies: Registry[object] = Registry("strategy", "lightlite.plugins:STRATEGIES")
    strategies.register("small_buckets", DDPStrategy, bucket_cap_mb=1.0)
    assert strategies.create("small_buckets").options["bucket_cap_mb"] == 1.0
    assert strategies.create("small_buckets", bucket_cap_mb=2.0).options["bucket_cap_mb"] == 2.0


def test_what_is_available_and_why_the_rest_is_not(accelerators: Registry[Accelerator]) -> None:
    accelerators.register("elsewhere", Elsewhere)
    available = accelerators.available()
    assert "cpu" in available
    assert "elsewhere" not in available
    assert accelerators.unavailable_reason("cpu") is None
    assert accelerators.unavailable_reason("elsewhere") == "no elsewhere device was found on this machine"
    assert accelerators.first_available("auto") in available
    with pytest.raises(UnknownPluginError, match=r"unknown accelerator 'cpuu'; registered: .*Did you mean 'cpu'\?"):
        accelerators.unavailable_reason("cpuu")


def test_a_package_that_is_broken_is_told_of_and_stops_nothing(
    accelerators: Registry[Accelerator],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(tmp_path, "missing = there_is_no_such_module:X", "raises = raising_module:X", "empty = json:NoSuchClass")
    (tmp_path / "raising_module.py").write_text("raise RuntimeError('driver too old')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"missing", "raises", "empty"} <= set(accelerators.names())
    assert not {"missing", "raises", "empty"} & set(accelerators.available())
    assert "No module named 'there_is_no_such_module'" in str(accelerators.unavailable_reason("missing"))
    assert "RuntimeError: driver too old" in str(accelerators.unavailable_reason("raises"))
    assert accelerators.describe("empty") == ""
    with caplog.at_level(logging.WARNING):
        assert "cpu" in accelerators.loadable()
    assert len(caplog.records) == 3


def test_a_broken_package_leaves_the_command_line_and_other_devices_alone(tmp_path: Path) -> None:
    install(tmp_path, "broken = there_is_no_such_module:X")
    program = (
        "import sys, lightlite as pl\n"
        "from lightlite.launch.cli import main\n"
        "print(type(pl.Trainer(accelerator='cpu', logger=False).accelerator).__name__)\n"
        "for name in ('broken', 'cpuu'):\n"
        "    try:\n"
        "        pl.Trainer(accelerator=name)\n"
        "    except pl.errors.MisconfigurationException as error:\n"
        "        print(error)\n"
        "main(['--list'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    made, broken, unknown, *listed = done.stdout.splitlines()
    assert made == "CPUAccelerator"
    assert broken.startswith(
        "accelerator='broken' cannot be used here: its package cannot be used: ModuleNotFoundError"
    )
    assert unknown.startswith("accelerator='cpuu' is unknown; registered: 'auto', 'gpu', 'cuda', 'mps', 'cpu'")
    lines = {line.split()[0]: line for line in listed}
    assert lines["cpu"].endswith("processes on the CPU's cores; available here")
    assert "not here: its package cannot be used: ModuleNotFoundError" in lines["broken"]
    assert "Simulated devices, one to a process" in lines["sim"]
    assert lines["ddp"].endswith("a copy of the model on every rank, gradients averaged")


def test_an_installed_strategy_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "mine = my_strategies:Mine", group="lightlite.strategies")
    (tmp_path / "my_strategies.py").write_text(
        "from lightlite.strategies import DDPStrategy\nclass Mine(DDPStrategy):\n    name = 'mine'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(StrategyRegistry.__dict__, "_installed", raising=False)
    try:
        assert type(pl.Trainer(accelerator="cpu", strategy="mine", logger=False).strategy).__name__ == "Mine"
    finally:
        StrategyRegistry.__dict__.pop("_installed", None)


def test_a_strategys_name_may_stand_in_the_accelerators_place() -> None:
    trainer = pl.Trainer(accelerator="ddp", devices=1, logger=False)
    assert (type(trainer.strategy).__name__, trainer.strategy.name) == ("DDPStrategy", "ddp")
    with pytest.raises(MisconfigurationException, match="tpu' is left out of lightlite on purpose"):
        pl.Trainer(accelerator="tpu")
    assert AcceleratorRegistry.left_out == ("tpu", "xla", "hpu")
