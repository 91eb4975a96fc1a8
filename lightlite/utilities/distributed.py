"""What ranks can find out together."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from lightlite.interfaces import Strategy
from lightlite.utilities.files import is_remote


def is_shared_filesystem(strategy: Strategy, path: str | Path | None = None, timeout: float = 3) -> bool:
    """Whether all ranks see one another's files in a folder. Every rank has to call it.

    Args:
        strategy: Of the Fabric or Trainer, whose ranks have been started.
        path: The folder; None for the working directory. A URL is shared.
        timeout: Seconds until a new file has to be seen.
    """
    if strategy.world_size == 1 or (path is not None and is_remote(path)):
        return True
    with tempfile.NamedTemporaryFile(dir=path or Path.cwd()) as mine:
        looked_for = Path(strategy.broadcast(mine.name))
        deadline = time.monotonic() + timeout
        while not (seen := looked_for.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return strategy.reduce_boolean_decision(seen)
