"""Ways in which ranks work together: the names people import, served through the registry when they are first used."""

from __future__ import annotations

from typing import Any

from lightlite.interfaces import Strategy
from lightlite.registry import StrategyRegistry

_OWN = {"Strategy": Strategy, "StrategyRegistry": StrategyRegistry}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    return StrategyRegistry.export(__name__, name)


def __dir__() -> list[str]:
    return sorted([*_OWN, *StrategyRegistry.exports()])
