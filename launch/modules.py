"""Modules on the way to another process: which of them it can import by itself, and which have changed since it did."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

_INSTALLED = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))

_specs: dict[str, ModuleSpec | None] = {}
_reloads: Counter[str] = Counter()
_caught_up: dict[str, int] = {}


def can_be_imported(name: str) -> bool:
    """Whether another process with the same `sys.path` finds the module, and from the same file.

    Not so for what was loaded from a file by hand, made in memory, or imported by pytest's mode `importlib`.
    """
    top = name.partition(".")[0]
    return top == "__main__" or _is_found(top, getattr(sys.modules.get(top), "__file__", None))


@functools.cache
def _is_found(name: str, file: str | None) -> bool:
    if name in sys.builtin_module_names or (file or "").startswith(_INSTALLED):
        return True
    found = None
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):  # finders are anybody's
            found = found or finder.find_spec(name, None)
    if found is None or file is None:
        return found is not None
    return found.origin is not None and os.path.realpath(found.origin) == os.path.realpath(file)


def count_reloads() -> tuple[tuple[str, int], ...]:
    """`(name, times)` of the modules that this process has loaded again since this was first called.

    Those of installed packages are not looked at.
    """
    for name, module in list(sys.modules.items()):
        if _is_own(module):
            spec = vars(module).get("__spec__")
            if _specs.setdefault(name, spec) is not spec:
                _specs[name] = spec
                _reloads[name] += 1
    return tuple(_reloads.items())


def _is_own(module: ModuleType) -> bool:
    file = getattr(module, "__dict__", {}).get("__file__")
    return isinstance(file, str) and not file.startswith(_INSTALLED)


def catch_up(reloads: Iterable[tuple[str, int]]) -> None:
    """Load again what the process that counted these reloads has loaded again and this one has not."""
    for name, times in reloads:
        if name in sys.modules and _caught_up.get(name, 0) != times:
            importlib.reload(sys.modules[name])
        _caught_up[name] = times
