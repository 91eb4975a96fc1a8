"""How new modules begin."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class NoInitialisation(TorchFunctionMode):
    """Within it, the functions of `torch.nn.init` leave tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
