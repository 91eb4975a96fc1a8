"""One process on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from lightlite.interfaces import Strategy


class SingleDeviceStrategy(Strategy):
    """The whole model on one device, no other ranks."""

    name = "single"

    def setup(self, module: nn.Module, training: bool) -> Callable[..., Any] | None:
        """Move `module` to the device; for training, its own `training_step` is the function to call."""
        self.module = module
        self.accelerator.move_module(module, self.root_device)
        return cast(Any, module).training_step if training else None
