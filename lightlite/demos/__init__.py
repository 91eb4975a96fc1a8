"""Small modules and data for bug reports and examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from lightlite.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
from lightlite.errors import missing_attribute

__all__ = ["BoringDataModule", "BoringModel", "DemoModel"]


if not TYPE_CHECKING:  # or type checkers would take every name for one that exists

    def __getattr__(name: str) -> NoReturn:
        raise missing_attribute(__name__, name)
