"""Small modules and data for bug reports and examples."""

from __future__ import annotations

from lightlite.demos.boring_classes import BoringDataModule, BoringModel, DemoModel

__all__ = ["BoringDataModule", "BoringModel", "DemoModel"]
