"""A callback out of functions."""

from __future__ import annotations

from collections.abc import Callable as Function
from typing import Any

from lightlite.callbacks.callback import Callback
from lightlite.errors import MisconfigurationException

_NO_HOOKS = {"state_dict", "load_state_dict", "log", "log_dict", "state_key"}
_HOOKS = [name for name in vars(Callback) if not name.startswith("_") and name not in _NO_HOOKS]


class LambdaCallback(Callback):
    """Calls given functions at given hooks.

    Args:
        hooks: A function for each hook's name, with the hook's arguments: `LambdaCallback(on_fit_end=lambda trainer,
            pl_module: ...)`. All hooks of `Callback` are allowed.

    Raises:
        MisconfigurationException: For a name that is no hook.
    """

    def __init__(self, **hooks: Function[..., Any] | None) -> None:
        unknown = [name for name in hooks if name not in _HOOKS]
        if unknown:
            raise MisconfigurationException(
                f"LambdaCallback({', '.join(unknown)}=...): no hook is called so; there are {', '.join(_HOOKS)}"
            )
        for name, function in hooks.items():
            if function is not None:
                setattr(self, name, function)
