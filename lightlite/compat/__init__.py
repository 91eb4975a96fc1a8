"""Lets programs written for PyTorch Lightning run as they are.

    import lightlite.compat
    lightlite.compat.install()      # from here on: import pytorch_lightning, import lightning.pytorch as pl, …

or, without touching the program, `python -m lightlite.launch --as-lightning train.py`.

`names.py` is the table of Lightning's modules and where lightlite has their names; `finder.py` serves it. The folder
`as_lightning/` is for `sys.path`, which data-loader workers and helper ranks take over from the process that starts
them: what they import from it installs the finder there.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from lightlite.compat.finder import LIGHTNING_VERSION, Finder
from lightlite.compat.names import TREES
from lightlite.errors import MisconfigurationException

__all__ = ["LIGHTNING_VERSION", "install"]

FOLDER = str(Path(__file__).with_name("as_lightning"))


def install() -> None:
    """Make `pytorch_lightning`, `lightning` and `lightning_fabric` mean lightlite, in this process and its helpers.

    Classes and functions are lightlite's own, so that `isinstance` and pickles do not see the difference. Whether the
    real packages are installed does not matter, as long as they have not been imported yet. `__version__` is that of
    the Lightning whose interface lightlite has, `LIGHTNING_VERSION`. A second call does nothing.

    Raises:
        MisconfigurationException: Where the real packages were imported before.
    """
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    for name in dict.fromkeys(tree.partition(".")[0] for tree in TREES):
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and (file is None or os.path.dirname(file) != FOLDER):
            raise MisconfigurationException(
                f"the real {name} is imported already, from {file}, and objects of two libraries do not mix; call "
                "lightlite.compat.install() before the first import of it (in a notebook, after a restart of the "
                "kernel), or run `python -m lightlite.launch --as-lightning script.py`"
            )
    sys.meta_path.insert(0, Finder())
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)


def take_place_of(name: str) -> None:
    """Called by the modules of `as_lightning/`, while they are imported: put lightlite in the module's place."""
    install()
    del sys.modules[name]
    importlib.import_module(name)
