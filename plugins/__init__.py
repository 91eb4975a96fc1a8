"""Everything that knows hardware, ranks or formats of numbers; also the public names for `Trainer(plugins=…)`.

Names are imported when they are first used, so that one plugin does not load the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightlite.errors import missing_attribute
from lightlite.interfaces import CheckpointIO, Precision

if TYPE_CHECKING:
    from lightlite.plugins.precision import (
        DoublePrecision,
        FullPrecision,
        HalfPrecision,
        MixedPrecision,
        TruePrecision,
    )
    from lightlite.saving import AsyncCheckpointIO, TorchCheckpointIO

__all__ = [
    "AsyncCheckpointIO",
    "CheckpointIO",
    "DoublePrecision",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TorchCheckpointIO",
    "TruePrecision",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        place = "lightlite.saving" if name.endswith("CheckpointIO") else "lightlite.plugins.precision"
        return getattr(import_module(place), name)
    raise missing_attribute(__name__, name)


def __dir__() -> list[str]:
    return __all__
