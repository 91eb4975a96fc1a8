"""LightningModules that went through `torch.compile` as a whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightlite.utilities.model_helpers import is_overridden

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def from_compiled(model: Any) -> Any:
    """The LightningModule that `torch.compile` was given, its steps compiled.

    `torch.compile(module)` returns a wrapper whose `forward` is compiled, and nothing else. What this returns is the
    module itself, changed in place; `to_uncompiled` takes that back.

    Args:
        model: What `torch.compile` returned.

    Raises:
        ValueError: For something else.
    """
    module = getattr(model, "_orig_mod", None)
    if not isinstance(module, nn.Module) or not hasattr(module, "training_step"):
        what = type(model if module is None else module).__name__
        raise ValueError(f"from_compiled was given {what}; give what torch.compile returned for a LightningModule")
    compiled = [name for name in STEPS if name == "forward" or is_overridden(name, module)]
    for name in compiled:
        setattr(module, name, model.dynamo_ctx(getattr(module, name)))
    module.__dict__["_compiled_steps"] = compiled
    return module


def to_uncompiled(model: Any) -> Any:
    """The LightningModule without what `from_compiled` did to it, or out of what `torch.compile` returned.

    Raises:
        ValueError: For a module that is not compiled.
    """
    module = getattr(model, "_orig_mod", model)
    compiled = getattr(module, "__dict__", {}).pop("_compiled_steps", None)
    if compiled is None and module is model:
        raise ValueError(
            f"to_uncompiled was given {type(model).__name__}, which is not compiled; give what from_compiled or "
            "torch.compile returned"
        )
    for name in compiled or ():
        delattr(module, name)
    return module
