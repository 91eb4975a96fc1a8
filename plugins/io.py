"""What writes and reads checkpoint files, under Lightning's name for the place."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightlite.errors import missing_attribute
from lightlite.interfaces import CheckpointIO

if TYPE_CHECKING:
    from lightlite.saving import AsyncCheckpointIO, TorchCheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("lightlite.plugins"), name)
    raise missing_attribute(__name__, name)


def __dir__() -> list[str]:
    return __all__
