"""Helpers for a loop of one's own; those of `lightlite.utilities` are here, too."""

from __future__ import annotations

from typing import Any

from lightlite import utilities
from lightlite.utilities.data import AttributeDict, suggested_max_num_workers
from lightlite.utilities.distributed import is_shared_filesystem

__all__ = ["AttributeDict", "is_shared_filesystem", "suggested_max_num_workers"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # its __path__ would make this a second package of the same files
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(utilities, name)
