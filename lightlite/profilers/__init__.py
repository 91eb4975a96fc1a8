"""What a run spends its time on: `Trainer(profiler=…)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from lightlite.errors import missing_attribute
from lightlite.profilers.advanced import AdvancedProfiler
from lightlite.profilers.base import PassThroughProfiler
from lightlite.profilers.profiler import Profiler
from lightlite.profilers.pytorch import PyTorchProfiler
from lightlite.profilers.simple import SimpleProfiler

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler"]

if not TYPE_CHECKING:  # or type checkers would take every name for one that exists

    def __getattr__(name: str) -> NoReturn:
        raise missing_attribute(__name__, name)
