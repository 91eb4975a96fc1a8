"""Norms of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The norm of each parameter's gradient, and of all together: for `self.log_dict` in `on_before_optimizer_step`.

    Args:
        module: Whose gradients; parameters without one are left out.
        norm_type: The p of the p-norm, above 0; "inf" for the largest absolute value.
        group_separator: Between "grad_<p>_norm" and the parameter's name.

    Returns:
        Scalars, by "grad_2.0_norm/<name>", and "grad_2.0_norm_total" for the norm of all gradients as one vector; empty
        where there are no gradients.

    Raises:
        ValueError: For a p that is not above 0.
    """
    order = float(norm_type)
    if not order > 0:
        raise ValueError(f"norm_type={norm_type!r}; give a number above 0, or 'inf'")
    gradients = {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}
    norms = {f"grad_{order}_norm{group_separator}{name}": _whole(grad.norm(order)) for name, grad in gradients.items()}
    if norms:
        together = torch.stack([norm.to(next(iter(norms.values())).device) for norm in norms.values()])
        norms[f"grad_{order}_norm_total"] = together.norm(order)
    return norms


def _whole(norm: Tensor) -> Tensor:
    """That of all ranks' parts, where each has a part of the gradient."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
