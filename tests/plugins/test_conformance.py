"""lightlite's own accelerators and strategies, tried by the suites that it offers to others."""

from __future__ import annotations

import pytest

from lightlite.plugins.testing import AcceleratorConformance, StrategyConformance

pytestmark = pytest.mark.filterwarnings("ignore:.*has a validation_step, but there is no val loader")


class TestCPU(AcceleratorConformance):
    accelerator = "cpu"
    limited = False


class TestSim(AcceleratorConformance):
    accelerator = "sim"


class TestCUDA(AcceleratorConformance):
    accelerator = "cuda"


class TestMPS(AcceleratorConformance):
    accelerator = "mps"


class TestSingle(StrategyConformance):
    strategy = "single"
    world_sizes = (1,)


class TestDDP(StrategyConformance):
    strategy = "ddp"


class TestFSDP(StrategyConformance):
    strategy = "fsdp"


class TestFSDPOnCUDA(StrategyConformance):
    strategy = "fsdp"
    accelerator = "cuda"


class TestDDPOnSim(StrategyConformance):
    strategy = "ddp"
    accelerator = "sim"

    @pytest.fixture(autouse=True)
    def _two_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SIM_DEVICES", "2")
