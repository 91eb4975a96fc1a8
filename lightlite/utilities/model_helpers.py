"""What a user has written, and what is there already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BASES = {"LightningModule", "LightningDataModule", "Callback"}


def is_overridden(method_name: str, instance: object = None, parent: type | None = None) -> bool:
    """Whether `instance` has its own method instead of `parent`'s, by subclassing or by assignment.

    Args:
        method_name: The method.
        instance: The object; None has nothing.
        parent: By default the class of lightlite's that the object's is made from: LightningModule,
            LightningDataModule or Callback.

    Raises:
        ValueError: Where no parent is given, and there is none of these.
    """
    method = getattr(instance, method_name, None)
    if method is None:
        return False
    if parent is None:
        ours = (kind for kind in type(instance).__mro__ if kind.__module__.partition(".")[0] == "lightlite")
        parent = next((kind for kind in ours if kind.__name__ in _BASES), None)
    if parent is None:
        raise ValueError(
            f"is_overridden({method_name!r}, {type(instance).__name__}): whose method it overrides is only known of a "
            "LightningModule, LightningDataModule or Callback; give parent=…"
        )
    return getattr(method, "__func__", method) is not getattr(parent, method_name, None)


def copy_of_tensors(module: nn.Module) -> nn.Module:
    """A module that has copies of another's parameters and buffers, under the same names, and nothing else."""
    parts: dict[int, nn.Module] = {}
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in copies:
            clone = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
        return copies[id(tensor)]

    def visit(part: nn.Module) -> nn.Module:
        if id(part) not in parts:
            twin = parts[id(part)] = nn.Module()
            twin.__dict__["_parameters"] = {name: copied(parameter) for name, parameter in part._parameters.items()}
            twin.__dict__["_buffers"] = {name: copied(buffer) for name, buffer in part._buffers.items()}
            twin._non_persistent_buffers_set = set(part._non_persistent_buffers_set)
            for name, child in part._modules.items():
                twin._modules[name] = None if child is None else visit(child)
        return parts[id(part)]

    return visit(module)


@torch.no_grad()
def overwrite(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor by another, which is put together first where ranks have parts of it, but not of the target.

    A collective call in that case. What is on device "meta" stays as it is.
    """
    if hasattr(value, "full_tensor") and not hasattr(target, "full_tensor"):
        value = value.full_tensor()
    if not target.is_meta:
        target.copy_(value)
