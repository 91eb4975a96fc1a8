"""Serves Lightning's module names, with lightlite's objects in them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightlite.compat.names import TREES, Tree
from lightlite.errors import missing_name

LIGHTNING_VERSION = "2.6.0"
"""The version whose interface lightlite has, which is what programs compare `__version__` with."""


class Finder(MetaPathFinder, Loader):
    """Finds every module that `names.py` lists; each is made when it is imported, and empty but for `__getattr__`."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of one of Lightning's modules; None for others.

        Raises:
            ImportError: For a name that lightlite does not have there. Python asks for a module of that name after
                `from pytorch_lightning.callbacks import Name` has found no such attribute, and this error, unlike
                the AttributeError, reaches the user as it is.
        """
        found = split(fullname)
        if found is None:
            return None
        tree, place = found
        if not place or place in tree.modules:
            return ModuleSpec(fullname, self, origin="lightlite.compat", is_package=True)
        parent, _, name = fullname.rpartition(".")
        raise ImportError(missing_name(parent, name, names_in(parent)), name=fullname)

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its two functions."""
        name = module.__name__
        vars(module).update(
            __doc__=f"{name}, served by lightlite.",
            __getattr__=functools.partial(look_up, name),
            __dir__=functools.partial(names_in, name),
        )


def split(name: str) -> tuple[Tree, str] | None:
    """The tree that a module of Lightning's is in, and its place there: "" for the root. None if it is not one's."""
    for root, tree in TREES.items():
        if name == root:
            return tree, ""
        if name.startswith(root + "."):
            return tree, name[len(root) + 1 :]
    return None


def look_up(module: str, name: str) -> Any:
    """`getattr` of one of Lightning's modules.

    Raises:
        AttributeError: Saying what there is in the module.
    """
    tree, place = _split(module)
    if name == "__version__" and not place:
        return LIGHTNING_VERSION
    if name == "__all__":
        return [each for each in names_in(module) if each not in _submodules(tree, place)]
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    if name in _submodules(tree, place):
        return importlib.import_module(f"{module}.{name}")
    for sources in _levels(tree, place):
        for source in sources:
            value = _value(source, name)
            if value is not _ABSENT:
                return value
    raise AttributeError(missing_name(module, name, names_in(module)))


_ABSENT = object()


def _value(source: ModuleType, name: str) -> Any:
    value = vars(source).get(name, _ABSENT)
    if value is _ABSENT and name in getattr(source, "__all__", ()):
        value = getattr(source, name)  # of a module that imports its names when they are asked for
    return _ABSENT if isinstance(value, ModuleType) else value


def names_in(module: str) -> list[str]:
    """What there is in one of Lightning's modules: public names, and the modules below it."""
    tree, place = _split(module)
    found = set(_submodules(tree, place))
    for source in next(_levels(tree, place), ()):
        found.update(getattr(source, "__all__", None) or _own_names(source))
    return sorted(name for name in found if not name.startswith("_"))


def _own_names(source: ModuleType) -> Iterator[str]:
    return (name for name, value in vars(source).items() if getattr(value, "__module__", "") == source.__name__)


def _split(module: str) -> tuple[Tree, str]:
    found = split(module)
    assert found is not None, module
    return found


@functools.cache
def _submodules(tree: Tree, place: str) -> frozenset[str]:
    prefix = f"{place}." if place else ""
    below = (module[len(prefix) :] for module in tree.modules if module.startswith(prefix))
    return frozenset(name for name in below if "." not in name)


def _levels(tree: Tree, place: str) -> Iterator[list[ModuleType]]:
    """The modules of lightlite that may have a module's names, the likeliest level first."""
    for level in tree.levels(place):
        found = [importlib.import_module(name) for name in level if _exists(name)]
        if found:
            yield found


@functools.cache
def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False
