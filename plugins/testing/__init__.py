"""The rules of `lightlite.interfaces` as tests, for whoever writes an accelerator or a strategy.

In a test file of one's own, with pytest:

    from lightlite.plugins.testing import AcceleratorConformance, StrategyConformance


    class TestSim(AcceleratorConformance):
        accelerator = "sim"


    class TestMine(StrategyConformance):
        strategy = "mine"

Each test is one rule; its name says which. Where the device is not on this machine, they are skipped, and the reason is
what `unavailable_reason()` says.
"""

from __future__ import annotations

from lightlite.plugins.testing.accelerators import AcceleratorConformance
from lightlite.plugins.testing.strategies import StrategyConformance

__all__ = ["AcceleratorConformance", "StrategyConformance"]
