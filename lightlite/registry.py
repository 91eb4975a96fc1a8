"""Finds plugins by name: those that come with lightlite, and those that installed packages declare.

A third party's package declares, in its pyproject.toml:

    [project.entry-points."lightlite.accelerators"]
    sim = "sim_accelerator:SimAccelerator"

and `Trainer(accelerator="sim")` works. What comes with lightlite is declared by `lightlite.plugins` and
`lightlite.launch` themselves, in a table each. Nothing is imported before somebody asks for it by name. This is also
the only road by which the core reaches those two.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lightlite.errors import UnknownPluginError, missing_attribute
from lightlite.interfaces import Accelerator, ClusterEnvironment, Launcher, OutputCollector, Precision, Strategy

P = TypeVar("P")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Declared:
    """What a package declares of one kind of plugins.

    Attributes:
        plugins: `{name: (where, description, keyword arguments)}` with where as "package.module:Class".
        groups: Names that stand for the first of several that can be used, as "auto" does.
        exports: What people import beside the classes: `{name: where}`.
        left_out: What is left out on purpose: names that begin with one of these.
    """

    plugins: Mapping[str, tuple[str, str, dict[str, Any]]]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


class Registry(Generic[P]):
    """Names and the plugin classes they stand for.

    Args:
        kind: What the plugins are, in messages: "accelerator".
        declared: Where the `Declared` of those that come with lightlite is: "package.module:NAME".
        group: Entry-point group in which installed packages declare more of them.
    """

    def __init__(self, kind: str, declared: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._where = declared
        self._classes: dict[str, tuple[type[P], str, dict[str, Any]]] = {}

    def register(
        self, name: str, plugin: type[P] | None = None, description: str = "", *, override: bool = False, **init: Any
    ) -> Any:
        """Register a class, as a call or as a decorator.

        Args:
            name: What users will write.
            plugin: The class; None to use the call as a decorator.
            description: One line for `--list`; by default the first of the class's docstring.
            override: Whether to replace what has that name already.
            init: Keyword arguments that the class is made with.

        Raises:
            UnknownPluginError: Where the name is taken and `override` is False.
        """
        if plugin is None:
            return lambda cls: self.register(name, cls, description, override=override, **init)
        if not override and (name in self or name in self.groups):
            raise UnknownPluginError(f"{self.kind} {name!r} is registered already; pass override=True to replace it")
        self._classes[name] = (plugin, description or _summary(plugin), init)
        return plugin

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._declared.plugins or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Names that stand for the first available of several."""
        return self._declared.groups

    @property
    def left_out(self) -> tuple[str, ...]:
        """What is left out on purpose: names that begin with one of these."""
        return self._declared.left_out

    def names(self) -> list[str]:
        """Every registered name, those that come with lightlite first."""
        return list(dict.fromkeys([*self._declared.plugins, *self._classes, *self._installed]))

    def loadable(self) -> dict[str, type[P]]:
        """Every registered name with its class. Of a package that is broken, a note goes to the log."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except Exception as error:  # whatever another's package raises must not stop the others
                _log.warning("the %s %r is left out: its package cannot be imported: %r", self.kind, name, error)
        return found

    def available(self) -> list[str]:
        """The names that can be used on this machine."""
        return [name for name in self.names() if self.unavailable_reason(name) is None]

    def unavailable_reason(self, name: str) -> str | None:
        """Why a plugin cannot be used on this machine; None where it can.

        Raises:
            UnknownPluginError: Where there is none of that name.
        """
        try:
            plugin: Any = self.get(name)
            return plugin.unavailable_reason() if hasattr(plugin, "unavailable_reason") else None
        except UnknownPluginError:
            raise
        except Exception as error:
            return f"its package cannot be used: {type(error).__name__}: {error}"

    def first_available(self, group: str) -> str | None:
        """The first of a group's names that can be used on this machine; None where none can."""
        return next((name for name in self.groups[group] if self.unavailable_reason(name) is None), None)

    def describe(self, name: str) -> str:
        """One line about a plugin; empty where its package is broken.

        Raises:
            UnknownPluginError: Where there is none of that name.
        """
        if name in self._classes:
            return self._classes[name][1]
        if name in self._declared.plugins:
            return self._declared.plugins[name][1]
        try:
            return _summary(self.get(name))
        except UnknownPluginError:
            raise
        except Exception:
            return ""

    def get(self, name: str) -> type[P]:
        """The class of that name.

        Raises:
            UnknownPluginError: Listing the names there are.
        """
        return self._find(name)[0]

    def create(self, name: str, **kwargs: Any) -> P:
        """An instance of the class of that name."""
        plugin, init = self._find(name)
        return plugin(**{**init, **kwargs})

    def exports(self) -> dict[str, str]:
        """What people import of the plugins that come with lightlite, and where it is: "package.module:name"."""
        classes = {where.partition(":")[2]: where for where, _, _ in self._declared.plugins.values()}
        return {**classes, **self._declared.exports}

    def export(self, module: str, name: str) -> Any:
        """What the `__getattr__` of a public module gives for a name of `exports`.

        Raises:
            AttributeError: Where the module has no such name.
            ImportError: Where it has been left out on purpose.
        """
        exports = self.exports()
        if name in exports:
            return _load(exports[name])
        raise missing_attribute(module, name)

    def _find(self, name: str) -> tuple[type[P], dict[str, Any]]:
        if name in self._classes:
            plugin, _, init = self._classes[name]
            return plugin, init
        if name in self._declared.plugins:
            where, _, init = self._declared.plugins[name]
            return _load(where), init
        if name in self._installed:
            return self._installed[name].load(), {}
        close = difflib.get_close_matches(str(name), self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownPluginError(f"unknown {self.kind} {name!r}; registered: {', '.join(self.names())}.{hint}")

    @functools.cached_property
    def _declared(self) -> Declared:
        declared: Declared = _load(self._where)
        return declared

    @functools.cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        found = entry_points(group=self.group) if self.group else ()
        return {point.name: point for point in found}


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(import_module(module), attribute)


def _summary(plugin: type) -> str:
    return (plugin.__doc__ or "").partition("\n")[0].rstrip(".")


CALLBACK_FACTORIES = "lightlite.callbacks_factory"
"""Entry-point group of functions without arguments, each of which returns a Callback, or a list, for every Trainer."""


def callbacks_of_packages() -> Iterator[tuple[str, Any]]:
    """What each function of that group returns, and what to call it in messages."""
    for point in _callback_factories():
        yield f"what {point.value} returns (entry point {point.name!r} of {CALLBACK_FACTORIES})", point.load()()


@functools.cache
def _callback_factories() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=CALLBACK_FACTORIES))


AcceleratorRegistry: Registry[Accelerator] = Registry(
    "accelerator", "lightlite.plugins:ACCELERATORS", group="lightlite.accelerators"
)

StrategyRegistry: Registry[Strategy] = Registry(
    "strategy", "lightlite.plugins:STRATEGIES", group="lightlite.strategies"
)

PrecisionRegistry: Registry[Precision] = Registry("precision", "lightlite.plugins:PRECISIONS")

LauncherRegistry: Registry[Launcher] = Registry("launcher", "lightlite.launch:LAUNCHERS")

EnvironmentRegistry: Registry[ClusterEnvironment] = Registry(
    "cluster environment", "lightlite.launch:ENVIRONMENTS", group="lightlite.environments"
)

CollectorRegistry: Registry[OutputCollector] = Registry("output collector", "lightlite.launch:COLLECTORS")
