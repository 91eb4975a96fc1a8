"""Moving batches."""

from __future__ import annotations

from typing import Any

import torch

from lightlite.nest import move_to


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """A nest with its tensors, and what else has a method `to(device)`, on a device.

    Args:
        batch: Any nest: lists, tuples, dicts, dataclasses, of any depth.
        device: Where to. Copies have arrived on return.
    """
    return move_to(batch, torch.device(device))
