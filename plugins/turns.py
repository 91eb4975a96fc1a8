"""How ranks run a module whose parameters are spread over them, also where they evaluate different numbers of batches.

Gathering a unit's parameters takes every rank. So while ranks evaluate, one that needs a unit says which, and one that
has nothing left to do says so; the highest number counts: that unit is gathered on all ranks, and those that need
another one ask again. A rank thus waits for nothing but others' needs, whatever each of them runs, and leaves when none
is left.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightlite import distributed
from lightlite.errors import MisconfigurationException

NOTHING = -1
_MIXED = "got mixed torch.Tensor and DTensor"


class Turns:
    """Gathers units, in evaluation for all ranks alike."""

    def __init__(self) -> None:
        self._units: list[FSDPModule] = []
        self._places: list[tuple[nn.Module, str]] = []
        self._taking = False

    def add(self, module: nn.Module) -> None:
        """Make a module's units known; the same ones in the same order on every rank."""
        for unit in module.modules():
            place = _own(unit) if isinstance(unit, FSDPModule) else None
            if place is not None:  # one without parameters of its own, apart from inner units', has nothing to gather
                self._units.append(cast(FSDPModule, unit))
                self._places.append(place)

    def gather(self, unit: Any) -> None:
        """Gather a unit's parameters, on all ranks."""
        if self._taking and unit in self._units:
            self._ask_for(self._units.index(unit))
        else:
            unit.unshard()

    def remove(self, module: nn.Module) -> None:
        """Release a module's units, and forget them."""
        self.reshard()
        own = {id(part) for part in module.modules()}
        kept = [(unit, place) for unit, place in zip(self._units, self._places, strict=True) if id(unit) not in own]
        self._units, self._places = [unit for unit, _ in kept], [place for _, place in kept]

    def reshard(self) -> None:
        """Release whatever is gathered."""
        for unit in self._units:
            unit.reshard()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A block in which ranks run what they like; left by all together."""
        handles = [
            cast(nn.Module, unit).register_forward_pre_hook(functools.partial(self._before, index), prepend=True)
            for index, unit in enumerate(self._units)
        ]
        self._taking = True
        try:
            yield
            while (wanted := _highest(NOTHING)) != NOTHING:
                self._gather_for_others(wanted)
        finally:
            self._taking = False
            for handle in handles:
                handle.remove()
        self.reshard()

    def _before(self, index: int, module: nn.Module, args: Any) -> None:
        self._ask_for(index)

    def _ask_for(self, index: int) -> None:
        if not self._is_released(index):
            return
        while (wanted := _highest(index)) != index:
            self._gather_for_others(wanted)
        self._units[index].unshard()

    def _gather_for_others(self, index: int) -> None:
        unit = self._units[index]
        mine = not self._is_released(index)
        unit.reshard()
        unit.unshard()
        if not mine:
            unit.reshard()

    def _is_released(self, index: int) -> bool:
        part, name = self._places[index]
        return isinstance(part._parameters[name], DTensor)


class Root(nn.Module):
    """The outermost unit. Its `forward` runs any method of the user's module, by name.

    Attributes:
        turns: Gathers units.
        has_buffers: Whether the module has any.
        came_whole: Whether this rank's module had values, and whether rank zero's had.
    """

    turns: Turns
    came_whole: tuple[bool, bool]

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.has_buffers = any(True for _ in module.buffers())
        self._depth = 0

    def prepare(self, turns: Turns) -> None:
        """Get ready, so that any part may be run first. All units stand, and have values."""
        self.turns = turns
        turns.add(self)
        cast(Any, self)._get_fsdp_state()._lazy_init()
        # A hook of the user's may run the module by itself.
        self.module.register_forward_pre_hook(self._enter, prepend=True)
        self.module.register_forward_hook(self._leave, always_call=True)

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the module.

        Raises:
            MisconfigurationException: Where a unit's parameters are used otherwise than by calling it.
        """
        run = self.module if method == "forward" else getattr(self.module, method)
        if isinstance(self.module, FSDPModule) and method != "forward":  # which alone gathers what is the module's own
            self.turns.gather(self.module)
        self._depth += 1
        try:
            return run(*args, **kwargs)
        except RuntimeError as error:
            if _MIXED in str(error):
                raise MisconfigurationException(
                    f"{type(self.module).__name__}.{method} uses parameters of a submodule that is sharded by itself, "
                    "without calling that submodule; call it, or give the strategy an auto_wrap_policy that leaves it "
                    "out, such as a set of classes"
                ) from error
            raise
        finally:
            self._depth -= 1

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._depth:
            self.turns.gather(self)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._depth:
            cast(FSDPModule, self).reshard()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which gradients stay local, and whole."""
        unit = cast(FSDPModule, self)
        unit.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            unit.set_requires_gradient_sync(True)


def _highest(index: int) -> int:
    return int(distributed.all_reduce(torch.tensor(index), "max"))


def _own(unit: Any) -> tuple[nn.Module, str] | None:
    """A place where the unit has a parameter, and no inner unit has it."""
    places: list[nn.Module] = [unit]
    while places:
        part = places.pop()
        for name, parameter in part._parameters.items():
            if parameter is not None:
                return part, name
        places += [child for child in part.children() if not isinstance(child, FSDPModule)]
    return None
