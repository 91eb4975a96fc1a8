"""What can be told of a batch or a loader, and how many workers a loader may have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from lightlite.errors import MisconfigurationException
from lightlite.utilities.combined_loader import sized_len
from lightlite.utilities.parsing import AttributeDict

__all__ = [
    "AttributeDict",
    "extract_batch_size",
    "has_iterable_dataset",
    "has_len",
    "size_of_batch",
    "sized_len",
    "suggested_max_num_workers",
]


def extract_batch_size(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor, or else of its first list of strings or numbers.

    Raises:
        MisconfigurationException: Where there is neither.
    """
    size = size_of_batch(batch)
    if size is None:
        raise MisconfigurationException(
            f"the batch size cannot be told from a batch of type {type(batch).__name__}, in which there is no tensor; "
            "where values are logged, pass batch_size=…"
        )
    return size


def size_of_batch(batch: Any) -> int | None:
    """The same; None where it cannot be told."""
    size = next(_sizes(batch, Tensor), None)
    return next(_sizes(batch, str), None) if size is None else size


def _sizes(batch: Any, kind: type) -> Iterator[int]:
    """Lengths of the tensors in a batch, in order; or, with `str`, of the lists of strings."""
    if isinstance(batch, Tensor):
        if kind is Tensor:
            yield batch.shape[0] if batch.dim() else 1
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value, kind)
    elif isinstance(batch, (list, tuple)):
        if batch and kind is str and all(isinstance(value, (str, bytes, int, float)) for value in batch):
            yield len(batch)
        for value in batch:
            yield from _sizes(value, kind)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _sizes(getattr(batch, field.name), kind)


def has_len(dataloader: object) -> bool:
    """Whether an object has a length."""
    return sized_len(dataloader) is not None


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether a loader's dataset is iterable-style."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many loader workers a rank may have: its share of the cores, less one for itself, and 1 at least.

    Args:
        local_world_size: Ranks on this machine.

    Raises:
        MisconfigurationException: For less than one.
    """
    if local_world_size < 1:
        raise MisconfigurationException(f"local_world_size={local_world_size}; give the number of ranks here, >= 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)
