"""What ranks do that hold the same module: see that it is the same, send it out, average tensors in buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor, nn

from lightlite import distributed
from lightlite.errors import MisconfigurationException

BUCKET_BYTES = 25 * 2**20
IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute in which a module names what PyTorch's DistributedDataParallel is to leave alone."""


def parameters_and_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that are to be equal on all ranks, with their names."""
    ignored = getattr(module, IGNORED, ())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in ignored:
            yield name, tensor


def check_same_modules(module: nn.Module) -> None:
    """See that every rank has built the same module. A collective call.

    Raises:
        MisconfigurationException: On every rank, naming the first parameter or buffer whose name, shape or dtype
            differs.
    """
    mine = [(name, _describe(name, tensor)) for name, tensor in parameters_and_buffers(module)]
    digests = distributed.gather_objects(hashlib.sha256(repr(mine).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    described = distributed.gather_objects(mine)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    for ours, theirs in zip_longest(described[0], described[other], fillvalue=(None, "")):
        if ours != theirs:
            first, second = (f"{name!r}, {what}" if name else "not there" for name, what in (ours, theirs))
            raise MisconfigurationException(
                f"the ranks have different modules: the first parameter or buffer that differs is {first} on rank 0, "
                f"and {second} on rank {other}. Build the same module on every rank: its layers may not depend on the "
                "rank, nor on data that differs between ranks."
            )


def _describe(name: str, tensor: Tensor) -> str:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise MisconfigurationException(
            f"{name!r} has no shape yet: ddp needs lazy layers to be initialized first. "
            "Run a batch through the module in setup() or configure_model(), or give the layers their sizes."
        )
    frozen = "" if tensor.requires_grad or not isinstance(tensor, nn.Parameter) else ", without requires_grad"
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}{frozen}"


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place by rank 0's, a bucket at a time."""
    for bucket in _buckets(tensors):
        flat = _flatten(bucket)
        distributed.broadcast(flat.view(torch.uint8))  # bytes, as not every backend knows every dtype
        if distributed.rank() != 0:
            _unflatten(flat, bucket)


def average(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place by their mean over the ranks, a bucket at a time."""
    for bucket in _buckets(tensors):
        # Divided first: the sum of many half-precision numbers could overflow.
        _unflatten(distributed.all_reduce(_flatten(bucket).div_(distributed.world_size()), "sum"), bucket)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, up to `BUCKET_BYTES` unless a single one is larger."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in by_kind.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _flatten(bucket: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _unflatten(flat: Tensor, bucket: list[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
