"""How the user's step functions want to be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightlite.errors import MisconfigurationException


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether a step wants the batch's index beside the batch.

    Raises:
        MisconfigurationException: For a step that takes nothing, or an iterator instead of a batch.
    """
    names, flexible = positional(step)
    if "dataloader_iter" in names:
        raise MisconfigurationException(
            f"{step.__qualname__}(dataloader_iter) is not supported; take (batch, batch_idx) instead"
        )
    if "optimizer_idx" in names:
        raise MisconfigurationException(
            f"{step.__qualname__} takes optimizer_idx, which Lightning 1.x handed it; take (batch, batch_idx), set "
            "self.automatic_optimization = False in __init__, and step each of self.optimizers() in training_step"
        )
    if not names and not flexible:
        raise MisconfigurationException(
            f"{step.__qualname__} takes no batch; define it as {step.__name__}(self, batch, batch_idx)"
        )
    return flexible or len(names) > 1


def with_batch_idx(call: Callable[..., Any], step: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """`call` for (batch, batch_idx), whether or not the user's `step` wants the index."""
    return call if takes_batch_idx(step) else lambda batch, batch_idx: call(batch)


def positional(step: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the positional parameters, and whether any number is taken."""
    parameters = inspect.signature(step).parameters.values()
    flexible = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds], flexible
