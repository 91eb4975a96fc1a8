"""What marks a callback as one that writes checkpoints."""

from __future__ import annotations

from lightlite.callbacks.callback import Callback


class Checkpoint(Callback):
    """Base of the callbacks that write checkpoints: they run after all others, to keep the others' newest state.

    At an epoch's end that is after the module too.
    """

    monitor: str | None = None
