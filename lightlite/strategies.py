"""Ways in which ranks work together: the names people import, served through the registry when they are first used."""

from __future__ import annotations

from typing import Any

from lightlite.errors import missing_attribute
from lightlite.interfaces import Strategy
from lightlite.registry import StrategyRegistry

__all__ = ["DDPStrategy", "SingleDeviceStrategy", "Strategy", "StrategyRegistry"]

DDPStrategy: Any
SingleDeviceStrategy: Any

_REGISTERED = {"DDPStrategy": "ddp", "SingleDeviceStrategy": "single"}


def __getattr__(name: str) -> Any:
    if name in _REGISTERED:
        return StrategyRegistry.get(_REGISTERED[name])
    raise missing_attribute(__name__, name)


def __dir__() -> list[str]:
    return __all__
