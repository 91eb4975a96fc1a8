"""What is kept of a logged value until the ranks' parts are put together: sum and weight apart."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLD_EVERY = 256


class Place(NamedTuple):
    """From where, and under which name, a value is logged."""

    hook: str | None
    name: str
    dataloader_idx: int | None
    suffixed: bool

    @property
    def suffix(self) -> str:
        """What is added to names where there are several loaders."""
        return f"/dataloader_idx_{self.dataloader_idx}" if self.suffixed and self.dataloader_idx is not None else ""


class Share(NamedTuple):
    """One rank's part of an epoch's value, as plain numbers."""

    reduce: str
    total: Any
    weight: float
    rank_zero_only: bool
    key: str
    logger: bool
    prog_bar: bool


@dataclass
class Entry:
    """One value that is logged again and again from one place."""

    place: Place
    given: tuple[Any, ...]
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduce: str | Callable[[Any], Any]
    rank_zero_only: bool

    def __post_init__(self) -> None:
        suffix = self.place.suffix
        forked = self.on_step and self.on_epoch
        self.key = self.place.name + suffix
        self.step_key = f"{self.place.name}_step{suffix}" if forked else self.key
        self.epoch_key = f"{self.place.name}_epoch{suffix}" if forked else self.key
        self.custom = not isinstance(self.reduce, str)
        self.latest: Any = None
        self.fresh = False
        self.reduced = False
        self.metric: Any = None
        self.values: list[Any] = []
        self.weights: list[float] = []
        self.total: Any = None
        self.weight = 0.0

    def add(self, value: Any, weight: float) -> None:
        """Set one step's value aside for the epoch's; a custom reduction gets the values in order of their weights."""
        self.values.append(value)
        self.weights.append(weight)
        if len(self.values) >= FOLD_EVERY:
            self.fold()

    def fold(self) -> None:
        """Reduce what was set aside since the last call, without waiting for the device."""
        if not self.values or self.custom:
            return
        assert isinstance(self.reduce, str)
        stacked = _stack(self.values)
        if self.reduce == "mean":
            self.total = (0 if self.total is None else self.total) + torch.dot(stacked, _filled(self.weights, stacked))
        elif self.reduce == "sum":
            self.total = (0 if self.total is None else self.total) + stacked.sum()
        else:
            known = stacked[:0] if self.total is None else self.total.reshape(1)
            self.total = getattr(torch.cat([known, stacked]), self.reduce)()
        self.weight += sum(self.weights)
        self.values, self.weights = [], []

    def state_dict(self) -> dict[str, Any]:
        """What was logged since the epoch began: what is not folded yet stays so, since sums depend on their order."""
        return {
            "place": list(self.place),
            "given": list(self.given),
            "latest": None if self.metric is not None or self.latest is None else float(self.latest),
            "values": _stack(self.values) if self.values else None,
            "weights": list(self.weights),
            "total": self.total,
            "weight": self.weight,
            "reduced": self.reduced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.latest, self.total, self.weight = state["latest"], state["total"], state["weight"]
        self.values = [] if state["values"] is None else list(state["values"].unbind())
        self.weights, self.reduced = list(state["weights"]), state["reduced"]

    def share(self) -> Share:
        """This rank's part of the epoch's value. Waits for the device."""
        flags = (self.rank_zero_only, self.epoch_key, self.logger, self.prog_bar)
        if self.custom:
            in_turn = list(zip(self.weights, _stack(self.values).tolist(), strict=True))
            return Share("custom", in_turn, float(len(in_turn)), *flags)
        self.fold()
        assert isinstance(self.reduce, str)
        return Share(self.reduce, float(self.total), self.weight, *flags)

    def step_value(self) -> Any:
        """The latest step's value, a number or a tensor of one element.

        None where a Metric was only updated, not called: it has no value of the batch, and computing the one of all
        batches so far would be a collective.
        """
        return self.latest if self.metric is None else getattr(self.metric, "_forward_cache", None)


def combine(shares: Sequence[Share], function: Callable[[Any], Any] | None = None) -> float:
    """The epoch's value, from every rank's part."""
    totals = [share.total for share in shares]
    reduce = shares[0].reduce
    if reduce == "custom":
        assert function is not None
        in_turn = sorted((pair for total in totals for pair in total), key=operator.itemgetter(0))
        return float(function(torch.tensor([value for _, value in in_turn], dtype=torch.float64)))
    if any(math.isnan(total) for total in totals):
        return math.nan
    if reduce in ("min", "max"):
        return float(min(totals) if reduce == "min" else max(totals))
    total = sum(totals)
    weight = sum(share.weight for share in shares)
    if reduce == "sum":
        return float(total)
    return float(total / weight) if weight else math.nan


def numbers(values: Sequence[Any]) -> list[float]:
    """Plain numbers from numbers and one-element tensors, waiting for each device once."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    read = iter(_stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def _filled(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A tensor of those numbers, made where `like` is: a copy from the host would wait for the device."""
    made, start = torch.empty_like(like), 0
    for number, run in itertools.groupby(numbers):
        stop = start + len(list(run))
        made[start:stop].fill_(number)
        start = stop
    return made


def _stack(values: Sequence[Any]) -> Tensor:
    device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
    wide = torch.float64 if _has_double(device) else torch.float32
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=wide)
    tensors = [value if isinstance(value, Tensor) else torch.tensor(value, dtype=wide) for value in values]
    first = tensors[0].dtype
    if all(tensor.dtype == first and tensor.dim() == 0 and tensor.device == device for tensor in tensors):
        return torch.stack(tensors).to(wide)
    return torch.stack([tensor.reshape(()).to(device=device, dtype=wide) for tensor in tensors])


_double: dict[str, bool] = {}


def _has_double(device: torch.device) -> bool:
    """Whether the device computes in double precision: tried once for each kind."""
    if device.type not in _double:
        try:
            torch.zeros((), device=device).to(torch.float64)
            _double[device.type] = True
        except (TypeError, RuntimeError):
            _double[device.type] = False
    return _double[device.type]
