"""Kinds of hardware: the names people import, served through the registry when they are first used."""

from __future__ import annotations

from typing import Any

from lightlite.interfaces import Accelerator
from lightlite.registry import AcceleratorRegistry

_OWN = {"Accelerator": Accelerator, "AcceleratorRegistry": AcceleratorRegistry}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    return AcceleratorRegistry.export(__name__, name)


def __dir__() -> list[str]:
    return sorted([*_OWN, *AcceleratorRegistry.exports()])
