"""The rules of `lightlite.interfaces` as tests, for whoever writes an accelerator or a strategy.

In a test file of one's own, with pytest:

    from lightlite.plugins.testing import AcceleratorConformance, StrategyConformance


    class TestSim(AcceleratorConformance):
        accelerator = "sim"


    class TestMine(StrategyConformance):
        strategy = "mine"

Each test is one rule; its name says which. What may be set beside the name is told by the classes. Where the device is
not on this machine, the tests are skipped, and the reason is what `unavailable_reason()` says.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("lightlite.plugins.testing.accelerators", "lightlite.plugins.testing.strategies")

from lightlite.plugins.testing.accelerators import AcceleratorConformance  # noqa: E402
from lightlite.plugins.testing.strategies import StrategyConformance  # noqa: E402

__all__ = ["AcceleratorConformance", "StrategyConformance"]
