"""Importing big libraries fast."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage is collected within.

    Modules make a great many objects and next to no garbage, but every so many of them set a collection off, and late
    ones go through all that torch has made before: a quarter of what importing takes, and more. Afterwards they count
    as long-lived, or the very next collection would go through them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


@functools.cache
def import_what_optimizers_need() -> None:
    """Have torch import what it puts off until the first optimizer is made, the greater part of torch.compile.

    Once a process: a later fit leaves what is young for the collector to find soon, such as the last fit's module.
    """
    import torch

    with without_collections():
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
