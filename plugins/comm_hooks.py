"""What a communication hook keeps between steps, and averaging of models between steps without communication."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightlite.distributed import Ranks
from lightlite.nest import apply_to_tensors
from lightlite.plugins import replicas


class HookState:
    """The state of a communication hook: sent to every rank, begun anew with every wrapper, kept in checkpoints.

    Of an object with an attribute `process_group`, as PowerSGDState and PostLocalSGDState are, the groups are left out
    when it is sent: it is made before there is a group, and None stands for all ranks. Any other object is sent, and
    handed on, as it is.

    Args:
        given: The user's object.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self._first = _copied(_values(given)) if _has_groups(given) else None

    def __getstate__(self) -> dict[str, Any]:
        if self._first is None:
            return {"given": self.given}
        values = {name: None if _is_group(value) else value for name, value in self._first.items()}
        return {"kind": type(self.given), "values": values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "kind" in state:
            state = {"given": _made(state["kind"], state["values"])}
        self.__init__(state["given"])  # type: ignore[misc]

    def begin(self, ranks: Ranks) -> None:
        """Make the user's object what it was at first: what it kept belongs to the buckets of another wrapper."""
        if self._first is not None:
            _set(self.given, _copied(self._first))
            self._find_subgroup(self.given, ranks)

    def separate(self, ranks: Ranks) -> Any:
        """A copy of the user's object as it was at first, for one of several wrappers."""
        if self._first is None:
            return self.given
        twin = _made(type(self.given), _copied(self._first))
        self._find_subgroup(twin, ranks)
        return twin

    @staticmethod
    def _find_subgroup(state: Any, ranks: Ranks) -> None:
        """The ranks of a machine, as PyTorch has it, but for any device."""
        if getattr(state, "subgroup", "") is None and getattr(state, "post_local_gradient_allreduce", True):
            state.subgroup, _ = dist.new_subgroups(group_size=ranks.local_world_size)

    def state_dict(self) -> dict[str, Any]:
        """What it keeps, as plain data: its own `state_dict`, or its numbers, tensors and random generators."""
        if self._first is None:
            own = getattr(self.given, "state_dict", None)
            return own() if callable(own) and not isinstance(self.given, nn.Module) else {}
        return {name: plain for name, value in _values(self.given).items() if (plain := _plain(value)) is not None}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Put back what `state_dict` returned."""
        if self._first is None:
            if state:
                self.given.load_state_dict(state)
            return
        for name, value in state.items():
            held = getattr(self.given, name)
            if hasattr(held, "set_state"):
                held.set_state(("MT19937", value["keys"].numpy().astype("uint32"), *value["rest"]))
            else:
                setattr(self.given, name, apply_to_tensors(value, lambda tensor: tensor.to(device, copy=True)))


def _has_groups(state: Any) -> bool:
    return hasattr(state, "process_group") and not _is_group(state)


def _is_group(value: Any) -> bool:
    return isinstance(value, dist.ProcessGroup)


def _values(state: Any) -> dict[str, Any]:
    slots = [name for kind in type(state).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(state, name) for name in slots if hasattr(state, name)}
    return {**found, **getattr(state, "__dict__", {})}


def _set(state: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(state, name, value)


def _made(kind: type[Any], values: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    _set(made, values)
    return made


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value if _is_group(value) else copy.deepcopy(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """A value as a checkpoint can keep it; None for what needs not, or cannot, be kept."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value).__name__ == "RandomState":
        _, keys, *rest = value.get_state()
        return {"keys": torch.from_numpy(keys.astype("int64")), "rest": rest}
    return None


class ModelAverager:
    """Averages the ranks' models every so many optimizer steps, between which each trains on its own (local SGD).

    The semantics are those of `torch.distributed.algorithms.model_averaging.averagers.PeriodicModelAverager`, but that
    what is evaluated and saved in between is the average, too.

    Args:
        module: Whose trained parameters are averaged.
        period: Optimizer steps from one averaging to the next.
        start: Optimizer steps before the first, in which gradients are averaged instead.

    Attributes:
        steps: Optimizer steps so far.
    """

    def __init__(self, module: nn.Module, period: int, start: int) -> None:
        self._module, self._period, self._start = module, period, start
        self.steps = 0
        self._own: list[Tensor] | None = None

    @property
    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    @property
    def _apart(self) -> bool:
        """Whether the ranks' models differ now."""
        return self.steps > self._start and (self.steps - 1 - self._start) % self._period != 0

    def restart(self) -> None:
        """Average, and begin to count anew. A collective call."""
        if self._apart:
            replicas.average(self._module.parameters())
        self.steps = 0

    def after_step(self) -> None:
        """Count an optimizer step, and average if it is time. A collective call."""
        self.steps += 1
        if self.steps > self._start and not self._apart:
            replicas.average(self._trained)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, every rank's model is the average; afterwards its own. A collective call."""
        if self._own is not None or not self._apart:
            yield
            return
        self._own = [parameter.detach().clone() for parameter in self._trained]
        replicas.average(self._trained)
        try:
            yield
        finally:
            own, self._own = self._own, None
            self._overwrite(own)

    def _overwrite(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._trained, values, strict=True):
            parameter.detach().copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The count, and this rank's own parameters where they differ from the others'."""
        own = self._own if self._own is not None else self._trained
        return {"steps": self.steps, "own": [value.detach().cpu().clone() for value in own] if self._apart else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.steps = state["steps"]
        if state["own"]:
            self._overwrite(state["own"])


def named_for(backend: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook under a name that PyTorch accepts: it refuses those for bfloat16 without NCCL, but gloo can do it too."""
    return (lambda state, bucket: hook(state, bucket)) if backend == "gloo" else hook
