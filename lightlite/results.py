"""What `self.log` does: values kept as they come, reduced in groups.

Between two log points nothing is computed that would make a device wait: values are set aside as tensors.
An `on_epoch` value keeps its sum and its weight apart, in double precision where the device has it, and is
brought together over the ranks once an epoch, in one message that also shows whether the ranks logged the
same keys. The names under which values reach loggers and callbacks follow Lightning 2.x.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightlite import distributed
from lightlite.entries import Entry, Place, Share, combine, numbers
from lightlite.errors import MetricError, MisconfigurationException
from lightlite.nest import apply_to_tensors
from lightlite.utilities.data import size_of_batch

REDUCTIONS = ("mean", "sum", "min", "max")

STEP_HOOKS = {
    "training_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "configure_gradient_clipping",
}
BATCH_HOOKS = STEP_HOOKS | {
    f"{before}{stage}{after}"
    for stage in ("validation", "test")
    for before, after in (("", "_step"), ("on_", "_batch_start"), ("on_", "_batch_end"))
}
EPOCH_HOOKS = {
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    *(f"on_{stage}_{when}" for stage in ("validation", "test") for when in ("start", "epoch_start", "epoch_end")),
}


ANY_BATCH = Counter({0: 1})
"""Stands for a rank that has had a batch, as each has in training."""


class Results:
    """What was logged in one loop since its epoch began."""

    def __init__(self, training: bool) -> None:
        self.training = training
        self.entries: dict[tuple[str | None, str, int | None, bool], Entry] = {}
        self.late: dict[str, float] = {}
        self.epoch_values: dict[Place, tuple[str, float]] = {}
        self.batches: Counter[int] = Counter()
        self.computed: list[Any] = []

    def state_dict(self, module: nn.Module, left_out: Iterable[Any] = ()) -> dict[str, Any]:
        """What was logged in this epoch, and the states of the module's torchmetrics' metrics.

        What was logged with a function to reduce it is left out.

        Args:
            module: The user's module.
            left_out: Metrics whose states are left out, so that they start anew.
        """
        plain = [
            entry
            for entry in self.entries.values()
            if all(isinstance(part, (bool, str, type(None))) for part in entry.given)
        ]
        entries = [{**entry.state_dict(), "metric": _path_of(entry, module)} for entry in plain]
        return {"entries": entries, "late": dict(self.late), "metrics": _metric_states(module, left_out)}

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        """Put back what `state_dict` returned."""
        self.late = dict(state["late"])
        _load_metric_states(module, state["metrics"])
        for kept in state["entries"]:
            entry = make_entry(Place(*kept["place"]), tuple(kept["given"]))
            entry.load_state_dict(kept)
            if kept["metric"]:
                entry.metric = entry.latest = module.get_submodule(kept["metric"])
            self.entries[entry.place] = entry

    @property
    def metrics(self) -> list[Any]:
        """The torchmetrics' metrics that were logged, by other ranks too."""
        logged = [entry.metric for entry in self.entries.values()] + self.computed
        return [metric for metric in logged if metric is not None]

    def reset(self) -> None:
        """Forget everything, for a new epoch; torchmetrics' metrics start anew."""
        for metric in self.metrics:
            metric.reset()
        self.computed.clear()
        self.entries.clear()
        self.epoch_values.clear()
        self.batches.clear()


class Recorder:
    """Takes what `self.log` is given, and holds the metrics of a trainer.

    The loops tell it where they are: `hook` (which hook is running), `batch`, `dataloader_idx`, and which
    loop's results are `active`.
    """

    def __init__(self) -> None:
        self.hook: str | None = None
        self.dataloader_idx: int | None = None
        self.active: Results | None = None
        self.module: nn.Module | None = None
        self.batch: Any = None
        self.lacks_batch = False
        """Whether this rank has no part in the global batch that is trained on."""
        self._measured: tuple[Any, int] | None = None
        self._callback: dict[str, Tensor] = {}
        self._progress_bar: dict[str, float] = {}
        self.logged: dict[str, Tensor] = {}

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Put back the metrics of a checkpoint, for callbacks and schedulers that watch one."""
        self._callback.update({key: torch.tensor(value) for key, value in metrics.items()})

    def forget(self) -> None:
        """Drop the metrics of the former call."""
        self._callback, self._progress_bar, self.logged = {}, {}, {}

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: str | Callable[[Any], Any],
        add_dataloader_idx: bool,
        batch_size: int | None,
        rank_zero_only: bool,
    ) -> None:
        """Set a value aside. The arguments are those of `LightningModule.log`."""
        results = self.active
        if results is None:
            raise MisconfigurationException(
                f"self.log({name!r}, …) was called while no loop is running; log inside of training_step, "
                "validation_step, test_step or a hook of their loops"
            )
        given = (prog_bar, logger, on_step, on_epoch, reduce_fx, rank_zero_only)
        place = (self.hook, name, self.dataloader_idx, add_dataloader_idx)
        entry = results.entries.get(place)
        if entry is None:
            entry = make_entry(Place(*place), given)
            _refuse_mixing_loaders(entry.place, results.entries.values())
            results.entries[place] = entry
        elif entry.given != given:
            raise MisconfigurationException(
                f"self.log({name!r}, …) was called twice in {self.hook} with different arguments: (prog_bar, logger, "
                f"on_step, on_epoch, reduce_fx, rank_zero_only) = {entry.given} and then {given}; use one set "
                "for a name"
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"self.log({name!r}, …) was given a tensor of shape {tuple(value.shape)}; log one number, such as "
                    "its .mean()"
                )
            value = value.detach().clone() if value.is_leaf else value.detach()
        elif not isinstance(value, (int, float)):
            value = _unusual(entry, value)
        entry.latest, entry.fresh, entry.reduced = value, True, False
        if entry.on_epoch and entry.metric is None:
            weighed = entry.reduce == "mean" and self.hook in BATCH_HOOKS
            lacking = self.lacks_batch and results.training
            size = 0 if weighed and lacking else batch_size
            if weighed and batch_size is None and not lacking:
                size = self._size_of_batch(name)
            entry.add(value, self._turn(entry) if entry.custom else 1 if not weighed or size is None else size)

    def _turn(self, entry: Entry) -> int:
        """Number of the batch on this rank: batches are dealt out in turn, which tells the order of all."""
        assert self.active is not None
        return len(entry.values) if self.active.training else self.active.batches[self.dataloader_idx or 0]

    def _size_of_batch(self, name: str) -> int:
        if self._measured is None or self._measured[0] is not self.batch:
            size = size_of_batch(self.batch)
            if size is None:
                raise MisconfigurationException(
                    f"self.log({name!r}, …) cannot tell the batch size from a batch of type "
                    f"{type(self.batch).__name__}; pass batch_size=…"
                )
            self._measured = (self.batch, size)
        return self._measured[1]

    def step_metrics(self) -> dict[str, float]:
        """What the values last logged on_step in this epoch come to, for the loggers. A collective call.

        With several ranks these are the values over all ranks: what one process would log.
        """
        assert self.active is not None
        entries = [entry for entry in self.active.entries.values() if entry.on_step and entry.step_value() is not None]
        values = numbers([entry.step_value() for entry in entries])
        if distributed.world_size() > 1:
            shares = {
                entry.place: Share(_step_reduction(entry), value, 1.0, *_flags(entry))
                for entry, value in zip(entries, values, strict=True)
                if entry.rank_zero_only or not self.lacks_batch
            }
            gathered = distributed.gather_objects((Counter() if self.lacks_batch else ANY_BATCH, shares))
            _agree(gathered)
            values = [combine(_parts(entry.place, gathered)) for entry in entries]
        for entry, value in zip(entries, values, strict=True):
            self._publish_step(entry, value)
            entry.fresh = False
        return {entry.step_key: value for entry, value in zip(entries, values, strict=True) if entry.logger}

    def take_steps(self) -> dict[str, Any]:
        """What was logged on_step in this batch, for the loggers, by key; left on the device. For evaluation."""
        self.publish_fresh()
        entries = self._fresh_steps()
        for entry in entries:
            entry.fresh = False
        return {entry.step_key: entry.step_value() for entry in entries if entry.logger}

    def _fresh_steps(self) -> list[Entry]:
        assert self.active is not None
        entries = [entry for entry in self.active.entries.values() if entry.on_step and entry.fresh]
        return [entry for entry in entries if entry.step_value() is not None]

    def _publish_step(self, entry: Entry, value: Any) -> None:
        tensor = torch.as_tensor(value).detach().reshape(())
        assert self.active is not None
        # Of evaluation, callbacks watch what its epoch comes to.
        if self.active.training or not entry.on_step:
            self._callback[entry.key] = self._callback[entry.step_key] = tensor
        if entry.logger:
            self.logged[entry.step_key] = tensor
        if entry.prog_bar:
            self._progress_bar[entry.step_key] = value

    def publish_fresh(self) -> None:
        """Show this rank's latest values to whoever asks in the middle of an epoch."""
        if self.active is None:
            return
        for entry in self.active.entries.values():
            if entry.fresh and entry.on_step and (value := entry.step_value()) is not None:
                self._publish_step(entry, value)
            elif entry.fresh and entry.metric is None and entry.place.hook in EPOCH_HOOKS:
                self._publish_step(entry, entry.latest)

    def reduce_epoch(self) -> dict[str, float]:
        """Bring values logged on_epoch, and not reduced yet, together over the ranks. A collective call.

        Returns:
            What goes to the loggers, by key. Callbacks find it under `callback_metrics`.

        Raises:
            MetricError: Where a rank that had batches did not log what another logged.
        """
        results = self.active
        assert results is not None
        self.publish_fresh()
        entries = {entry.place: entry for entry in results.entries.values() if entry.on_epoch and not entry.reduced}
        shares = {place: entry.share() for place, entry in entries.items() if entry.metric is None}
        shares |= {
            p: Share("metric", _path_of(e, self.module), 1.0, *_flags(e))
            for p, e in entries.items()
            if e.metric is not None
        }
        gathered = distributed.gather_objects((self._batches_had(results), shares))
        _agree(gathered)
        logged, results.late = results.late, {}
        places = dict.fromkeys(place for _, by_place in gathered for place in by_place)
        for place in places:
            parts = _parts(place, gathered)
            value = self._value_of(place, parts, results)
            if parts[0].reduce == "custom" and len(parts) < len(gathered):
                # The function stays with those who logged something.
                value = distributed.broadcast_object(
                    value, next(r for r, (_, own) in enumerate(gathered) if place in own)
                )
            self._publish_epoch(place, parts[0], value)
            if parts[0].logger:
                results.epoch_values[place] = (parts[0].key, value)
                logged[parts[0].key] = value
        for entry in entries.values():
            entry.reduced = True
        for entry in results.entries.values():
            entry.fresh = False
        return logged

    def _batches_had(self, results: Results) -> Counter[int]:
        if not results.training:
            return results.batches
        stepped = not self.lacks_batch or any(place[0] == "training_step" for place in results.entries)
        return ANY_BATCH if stepped else Counter()

    def reduce_epoch_quietly(self) -> None:
        """Bring together what hooks at the epoch's end logged, so that callbacks can watch it."""
        assert self.active is not None
        self.active.late |= self.reduce_epoch()

    def per_loader(self, count: int) -> list[dict[str, float]]:
        """The epoch's values by key, for each of `count` loaders; what belongs to no loader is in each."""
        assert self.active is not None
        values = self.active.epoch_values
        return [
            {key: value for place, (key, value) in values.items() if place.dataloader_idx in (None, index)}
            for index in range(count)
        ]

    def _value_of(self, place: Place, parts: list[Share], results: Results) -> float:
        if parts[0].reduce != "metric":
            entry = results.entries.get(place)
            if parts[0].reduce == "custom" and entry is None:
                return math.nan
            function = None if entry is None or isinstance(entry.reduce, str) else entry.reduce
            return combine(parts, function)
        metric = self._metric(place, parts, results)
        results.computed.append(metric)
        return float(metric.compute())

    def _metric(self, place: Place, parts: list[Share], results: Results) -> Any:
        """The metric that was logged, on ranks as well that had no batch to log it with.

        Raises:
            MisconfigurationException: On every rank, where such a rank cannot find it.
        """
        path = parts[0].total
        if not path and len(parts) < distributed.world_size():
            raise MisconfigurationException(
                f"self.log({place.name!r}, …) was given a metric that is no attribute of the module, and there are "
                f"ranks without a batch, which cannot find it; assign it in __init__, as in self.{place.name} = …"
            )
        entry = results.entries.get(place)
        assert self.module is not None
        return self.module.get_submodule(path) if entry is None else entry.metric

    def _publish_epoch(self, place: Place, share: Share, value: float) -> None:
        tensor = torch.tensor(value)
        self._callback[place.name + place.suffix] = self._callback[share.key] = tensor
        if share.logger:
            self.logged[share.key] = tensor
        if share.prog_bar:
            self._progress_bar[share.key] = value

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The latest of everything logged, for callbacks and schedulers, who may add to it; never collective."""
        self.publish_fresh()
        return self._callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The latest of everything that is for the loggers, whether or not its turn to be logged has come."""
        self.publish_fresh()
        return dict(self.logged)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The latest of what was logged with prog_bar=True, as numbers; waits for the device."""
        self.publish_fresh()
        return dict(zip(self._progress_bar, numbers(list(self._progress_bar.values())), strict=True))


def make_entry(place: Place, given: tuple[Any, ...]) -> Entry:
    """What a first `self.log` from a place means.

    Raises:
        MisconfigurationException: For a hook that cannot log, options that contradict one another, a name or a
            reduction that is none.
    """
    prog_bar, logger, on_step, on_epoch, reduce_fx, rank_zero_only = given
    hook, name = place.hook, place.name
    if not isinstance(name, str):
        raise MisconfigurationException(f"self.log was given the name {name!r}; give a string")
    if "/dataloader_idx_" in name:
        raise MisconfigurationException(
            f"self.log({name!r}, …): '/dataloader_idx_' is added by itself where there are several loaders; "
            "choose another"
        )
    if hook not in BATCH_HOOKS and hook not in EPOCH_HOOKS:
        raise MisconfigurationException(
            f"self.log({name!r}, …) cannot be used inside {hook or 'code outside of the hooks'}; log inside of "
            "a step, or of a batch or epoch hook of training, validation or test"
        )
    if hook in EPOCH_HOOKS and (on_step or on_epoch is False):
        raise MisconfigurationException(
            f"self.log({name!r}, on_step={on_step}, on_epoch={on_epoch}) inside {hook}, which belongs to no "
            "step; leave on_step and on_epoch out"
        )
    on_step = hook in STEP_HOOKS if on_step is None else on_step
    on_epoch = hook not in STEP_HOOKS if on_epoch is None else on_epoch
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"self.log({name!r}, on_step=False, on_epoch=False) asks for nothing; set one of them"
        )
    reduce = getattr(reduce_fx, "__name__", reduce_fx)
    reduce = {"avg": "mean", "amin": "min", "amax": "max"}.get(reduce, reduce)
    if reduce not in REDUCTIONS:
        if not callable(reduce_fx):
            raise MisconfigurationException(
                f"self.log({name!r}, reduce_fx={reduce_fx!r}): allowed are {', '.join(map(repr, REDUCTIONS))} "
                "and functions from a tensor of shape (steps,) to a number"
            )
        reduce = reduce_fx
    return Entry(place, given, prog_bar, logger is not False, on_step, on_epoch, reduce, rank_zero_only)


def _refuse_mixing_loaders(place: Place, others: Iterable[Entry]) -> None:
    unsuffixed = (place.hook, place.name, False)
    if not place.suffixed and any((o.place.hook, o.place.name, o.place.suffixed) == unsuffixed for o in others):
        raise MisconfigurationException(
            f"self.log({place.name!r}, add_dataloader_idx=False) was called for several loaders, whose values would be "
            f"mixed up; give each a name of its own, as in f'{place.name}_{{dataloader_idx}}', or leave "
            "add_dataloader_idx out"
        )


def _path_of(entry: Entry, module: nn.Module | None) -> str:
    """Where in the module a logged Metric lies; empty where it is elsewhere, or a value was logged."""
    parts = module.named_modules() if module is not None and entry.metric is not None else ()
    return next((path for path, part in parts if part is entry.metric), "")


def _metrics_in(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        if isinstance(getattr(part, "_defaults", None), dict) and hasattr(part, "_update_count"):
            yield path, part


def idle_metrics(module: nn.Module) -> list[Any]:
    """The module's torchmetrics' metrics that have gathered nothing since they were last reset."""
    return [metric for _, metric in _metrics_in(module) if not metric._update_count]


def _metric_states(module: nn.Module, left_out: Iterable[Any]) -> dict[str, Any]:
    """What torchmetrics' metrics have gathered, which a module's `state_dict` leaves out."""
    ids = set(map(id, left_out))
    return {
        path: {
            "states": {name: getattr(metric, name) for name in metric._defaults},
            "updates": metric._update_count,
            "latest": getattr(metric, "_forward_cache", None),
        }
        for path, metric in _metrics_in(module)
        if metric._update_count and id(metric) not in ids
    }


def _load_metric_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    for path, metric in _metrics_in(module):
        if path in states:
            kept = states[path]
            for name, value in kept["states"].items():
                setattr(metric, name, apply_to_tensors(value, operator.methodcaller("to", metric.device)))
            metric._update_count, metric._forward_cache, metric._computed = kept["updates"], kept["latest"], None


def _flags(entry: Entry) -> tuple[bool, str, bool, bool]:
    return entry.rank_zero_only, entry.epoch_key, entry.logger, entry.prog_bar


def _step_reduction(entry: Entry) -> str:
    return entry.reduce if isinstance(entry.reduce, str) else "mean"


def _parts(place: Place, gathered: list[tuple[Counter[int], dict[Place, Share]]]) -> list[Share]:
    """What the ranks have of one value; rank zero's alone, where it alone counts."""
    parts = [shares[place] for _, shares in gathered if place in shares]
    return parts[:1] if parts[0].rank_zero_only else parts


def _agree(gathered: list[tuple[Counter[int], dict[Place, Share]]]) -> None:
    """Every rank that had batches must have logged the same, but for what rank zero alone logs."""
    everything = {place: share for _, shares in gathered for place, share in shares.items()}
    for rank, (batches, shares) in enumerate(gathered):
        missing = [
            place
            for place, share in everything.items()
            if place not in shares
            and not share.rank_zero_only
            and (any(batches.values()) if place.dataloader_idx is None else batches[place.dataloader_idx])
        ]
        if missing:
            having = [r for r, (_, other) in enumerate(gathered) if missing[0] in other]
            raise MetricError(
                f"rank {rank} did not log {missing[0].name!r} in {missing[0].hook}, which rank {having[0]} "
                "logged; log every "
                "name on every rank, or pass rank_zero_only=True where rank zero alone knows the value"
            )


def _unusual(entry: Entry, value: Any) -> Any:
    if callable(getattr(value, "compute", None)) and callable(getattr(value, "update", None)):
        entry.metric = value
        return value
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return value.item()
    raise ValueError(
        f"self.log({entry.place.name!r}, …) was given {value!r} of type {type(value).__name__}; log a number, a "
        "tensor of one element, or a torchmetrics Metric"
    )
