"""Memory: letting go of it, and knowing when it ran out."""

from __future__ import annotations

import gc
from typing import Any

import torch

from lightlite.nest import apply_to_tensors

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cudnn_status_not_supported")
"""What is in a RuntimeError of torch's, of whatever device, when there was too little memory, in lower case."""


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """A nest with its tensors detached from the graph.

    Args:
        in_dict: Any nest of tensors.
        to_cpu: Whether to move them to the CPU too.
    """
    return apply_to_tensors(in_dict, lambda tensor: tensor.detach().cpu() if to_cpu else tensor.detach())


def is_oom_error(exception: BaseException) -> bool:
    """Whether an exception says that memory ran out, a device's or the CPU's."""
    if isinstance(exception, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(exception).lower()
    return isinstance(exception, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether an exception says that the CPU's memory ran out."""
    allocator = isinstance(exception, RuntimeError) and "DefaultCPUAllocator" in str(exception)
    return isinstance(exception, MemoryError) or (allocator and is_oom_error(exception))


def garbage_collection_cuda() -> None:
    """Collect garbage, and hand memory that torch keeps for later back to the accelerator, whichever it is.

    The name is Lightning's. An accelerator that the process has not used yet is not touched.
    """
    gc.collect()
    if not torch.accelerator.is_available():
        return
    module = torch.get_device_module()
    if not getattr(module, "is_initialized", lambda: True)():
        return
    try:
        module.empty_cache()
    except RuntimeError as error:  # it may be too late for this, too
        if not is_oom_error(error):
            raise
