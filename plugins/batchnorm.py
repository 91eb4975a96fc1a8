"""Batch normalization whose statistics are those of all ranks' batches together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightlite import distributed

_BY_PYTORCH = ("cuda", "xpu", "hpu")
"""Devices for which PyTorch's own SyncBatchNorm is written."""


class SyncedBatchNorm(nn.SyncBatchNorm):
    """PyTorch's SyncBatchNorm, which works on any device, and where ranks have nothing to say to one another.

    Shapes: input (batch, channels, …); the batch may differ from rank to rank, and be empty on some.
    """

    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by mean and variance over the batch and all ranks; in evaluation by the running ones."""
        uses_batch = self.training or self.running_mean is None
        if not self.training or not uses_batch or distributed.world_size() == 1:
            return self._alone(input, uses_batch)
        if input.device.type in _BY_PYTORCH:
            return super().forward(input)
        self._check_input_dim(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = distributed.all_reduce(torch.tensor(input.numel() / max(input.size(1), 1), dtype=torch.double), "sum")
        total = count.item()
        mean = distributed.gather_with_grad(wide.sum(dims)).sum(0) / total
        centered = wide - mean.view(shape)
        variance = distributed.gather_with_grad(centered.square().sum(dims)).sum(0) / total
        self._track(mean, variance, total)
        normalized = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)

    def _alone(self, input: Tensor, uses_batch: bool) -> Tensor:
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            uses_batch,
            self._next_momentum(),
            self.eps,
        )

    def _next_momentum(self) -> float:
        """How much of the running statistics this batch replaces; counts the batch."""
        if not self.training or not self.track_running_stats or self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, total: float) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        momentum = self._next_momentum()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (total / max(total - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


Former = list[tuple[nn.Module, type[nn.Module]]]


def synchronize(module: nn.Module) -> Former:
    """Have each layer of batch normalization be a `SyncedBatchNorm` from now on: the same object, by another class.

    Returns:
        The layers and the classes that they were of, for `restore`.
    """
    former: Former = []
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            former.append((layer, type(layer)))
            layer.__class__ = SyncedBatchNorm
    return former


@contextmanager
def bare(former: Former) -> Iterator[None]:
    """Within it, the layers are what they were: PyTorch's DistributedDataParallel refuses synced ones on the CPU."""
    restore(former)
    yield
    for layer, _ in former:
        layer.__class__ = SyncedBatchNorm


def restore(former: Former) -> None:
    """Make the layers what they were."""
    for layer, kind in former:
        layer.__class__ = kind
