"""How children that a helper process spawns, such as loader workers, get what the script defines.

A child that the script's own process spawns runs the script's file anew, and finds its functions and classes there.
The main module of a helper is another; what a helper has of the script came by value, and goes on by value.
"""

from __future__ import annotations

from multiprocessing import reduction
from typing import Any, BinaryIO

from lightlite.launch import transport


def send_by_value() -> None:
    """From now on, have multiprocessing send a spawned child by value what it could not import."""
    reduction.dump = _dump  # type: ignore[assignment]


def _dump(value: Any, file: BinaryIO, protocol: int | None = None) -> None:
    shared = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    transport.pack_for_child(value, file, shared)
