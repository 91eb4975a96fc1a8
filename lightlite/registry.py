"""Finds plugins by name: the built-in ones, and those that installed packages declare.

A third party's package declares, in its pyproject.toml:

    [project.entry-points."lightlite.accelerators"]
    sim = "sim_accelerator:SimAccelerator"

and `Trainer(accelerator="sim")` works. Nothing is imported before somebody asks for it by name. This is
also the only road by which the core reaches `lightlite.plugins` and `lightlite.launch`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lightlite.errors import UnknownPluginError
from lightlite.interfaces import Accelerator, ClusterEnvironment, Launcher, OutputCollector, Precision, Strategy

P = TypeVar("P")


class Registry(Generic[P]):
    """Names and the plugin classes they stand for.

    Args:
        kind: What the plugins are, in messages: "accelerator".
        builtin: `{name: (where, description, keyword arguments)}` with where as "package.module:Class".
        group: Entry-point group in which installed packages declare more of them.
        groups: Names that stand for the first available of several, as "auto" does.
    """

    def __init__(
        self,
        kind: str,
        builtin: dict[str, tuple[str, str, dict[str, Any]]],
        group: str | None = None,
        groups: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.kind = kind
        self.group = group
        self.groups = groups or {}
        self._lazy = dict(builtin)
        self._classes: dict[str, tuple[type[P], str, dict[str, Any]]] = {}
        self._entry_points: dict[str, EntryPoint] | None = None

    def register(
        self, name: str, plugin: type[P] | None = None, description: str = "", *, override: bool = False, **init: Any
    ) -> Any:
        """Register a class, as a call or as a decorator.

        Args:
            name: What users will write.
            plugin: The class; None to use the call as a decorator.
            description: One line for `--list`.
            override: Whether to replace what has that name already.
            init: Keyword arguments that the class is made with.

        Raises:
            UnknownPluginError: Where the name is taken and `override` is False.
        """
        if plugin is None:
            return lambda cls: self.register(name, cls, description, override=override, **init)
        if name in self and not override:
            raise UnknownPluginError(f"{self.kind} {name!r} is registered already; pass override=True to replace it")
        self._classes[name] = (plugin, description or (plugin.__doc__ or "").partition("\n")[0], init)
        return plugin

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._lazy or name in self._installed()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """Every registered name, the built-in ones first."""
        return list(dict.fromkeys([*self._lazy, *self._classes, *self._installed()]))

    def available(self) -> list[str]:
        """The names that can be used on this machine."""
        usable = []
        for name in self.names():
            is_available: Callable[[], bool] = getattr(self.get(name), "is_available", lambda: True)
            if is_available():
                usable.append(name)
        return usable

    def describe(self, name: str) -> str:
        """One line about a plugin."""
        if name in self._classes:
            return self._classes[name][1]
        return self._lazy[name][1] if name in self._lazy else (self.get(name).__doc__ or "").partition("\n")[0]

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

    def _find(self, name: str) -> tuple[type[P], dict[str, Any]]:
        if name in self._classes:
            plugin, _, init = self._classes[name]
            return plugin, init
        if name in self._lazy:
            where, _, init = self._lazy[name]
            module, _, attribute = where.partition(":")
            return getattr(import_module(module), attribute), init
        if name in self._installed():
            return self._installed()[name].load(), {}
        close = difflib.get_close_matches(str(name), self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownPluginError(f"unknown {self.kind} {name!r}; registered: {', '.join(self.names())}.{hint}")

    def _installed(self) -> dict[str, EntryPoint]:
        if self._entry_points is None:
            found = entry_points(group=self.group) if self.group else ()
            self._entry_points = {point.name: point for point in found}
        return self._entry_points


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
    "accelerator",
    {
        "cuda": ("lightlite.plugins.cuda:CUDAAccelerator", "NVIDIA GPUs, and AMD GPUs under ROCm", {}),
        "mps": ("lightlite.plugins.mps:MPSAccelerator", "the GPU of Apple silicon", {}),
        "cpu": ("lightlite.plugins.cpu:CPUAccelerator", "processes on the CPU's cores", {}),
    },
    group="lightlite.accelerators",
    groups={"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")},
)

StrategyRegistry: Registry[Strategy] = Registry(
    "strategy",
    {
        "single": ("lightlite.plugins.single:SingleDeviceStrategy", "one process, one device", {}),
        "single_device": ("lightlite.plugins.single:SingleDeviceStrategy", "the same as single", {}),
        "ddp": ("lightlite.plugins.ddp:DDPStrategy", "a copy of the model on every rank, gradients averaged", {}),
        **{
            name: ("lightlite.plugins.ddp:DDPStrategy", "the same as ddp", {})
            for name in ("ddp_spawn", "ddp_fork", "ddp_notebook")
        },
        **{
            f"{name}_find_unused_parameters_{word}": ("lightlite.plugins.ddp:DDPStrategy", *what)
            for word, what in {
                "true": ("ddp for models that leave parameters unused in a step", {"find_unused_parameters": True}),
                "false": ("the same as ddp", {}),
            }.items()
            for name in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
        },
    },
    group="lightlite.strategies",
)

PrecisionRegistry: Registry[Precision] = Registry(
    "precision",
    {
        "32-true": ("lightlite.plugins.precision:FullPrecision", "float32", {}),
        "64-true": ("lightlite.plugins.precision:TruePrecision", "float64", {"precision": "64-true"}),
        "16-true": ("lightlite.plugins.precision:TruePrecision", "float16", {"precision": "16-true"}),
        "bf16-true": ("lightlite.plugins.precision:TruePrecision", "bfloat16", {"precision": "bf16-true"}),
        "16-mixed": ("lightlite.plugins.precision:MixedPrecision", "float16 autocast", {"precision": "16-mixed"}),
        "bf16-mixed": ("lightlite.plugins.precision:MixedPrecision", "bfloat16 autocast", {"precision": "bf16-mixed"}),
    },
)

LauncherRegistry: Registry[Launcher] = Registry(
    "launcher", {"helpers": ("lightlite.launch.helpers:HelperPool", "helper processes of the calling script", {})}
)

EnvironmentRegistry: Registry[ClusterEnvironment] = Registry(
    "cluster environment",
    {
        "torchelastic": ("lightlite.launch.environment:TorchElasticEnvironment", "torchrun and lightlite.launch", {}),
        "slurm": ("lightlite.launch.environment:SlurmEnvironment", "srun", {}),
        "mpi": ("lightlite.launch.environment:MPIEnvironment", "mpirun", {}),
        "lsf": ("lightlite.launch.environment:LSFEnvironment", "LSF's jsrun", {}),
        "kubernetes": ("lightlite.launch.environment:KubernetesEnvironment", "Kubernetes' PyTorchJob", {}),
    },
    group="lightlite.environments",
)

CollectorRegistry: Registry[OutputCollector] = Registry(
    "output collector", {"files": ("lightlite.launch.collect:FileCollector", "memory-mapped files", {})}
)
