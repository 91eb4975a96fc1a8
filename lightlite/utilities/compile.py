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
    if "_compiled_steps" not in module.__dict__:
        names = [name for name in STEPS if name == "forward" or is_overridden(name, module)]
        compile_steps(module, names, model.dynamo_ctx)
    return module


def compile_steps(module: Any, names: list[str], compiler: Any) -> None:
    """Put compiled methods in the place of the module's own; both are noted, for a copy of it to be compiled alike."""
    for name in names:
        module.__dict__[name] = compiler(getattr(module, name))
    module.__dict__.update(_compiled_steps=names, _compiler=compiler)


def to_uncompiled(model: Any) -> Any:
    """The LightningModule without what `from_compiled` did to it, or out of what `torch.compile` returned.

    Raises:
        ValueError: For a module that is not compiled.
    """
    module = getattr(model, "_orig_mod", model)
    compiled = getattr(module, "__dict__", {}).pop("_compiled_steps", None)
    getattr(module, "__dict__", {}).pop("_compiler", None)
    if compiled is None and module is model:
        raise ValueError(
            f"to_uncompiled was given {type(model).__name__}, which is not compiled; give what from_compiled or "
            "torch.compile returned"
        )
    for name in compiled or ():
        delattr(module, name)
    return module
