"""Reads the Trainer's arguments: checks them, and chooses hardware, strategy and precision."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator, CheckpointIO, ClusterEnvironment, Launcher, Precision, Strategy
from lightlite.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightlite.registry import (
    AcceleratorRegistry,
    EnvironmentRegistry,
    LauncherRegistry,
    PrecisionRegistry,
    Registry,
    StrategyRegistry,
)
from lightlite.saving import TorchCheckpointIO
from lightlite.utilities import affinity
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

Instance = TypeVar("Instance")
PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}

PrecisionName: TypeAlias = Literal[
    64, 32, 16, "16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true", "64", "32", "16", "bf16"
]  # fmt: skip
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


@dataclass
class Hardware:
    """What a run computes on.

    Attributes:
        accelerator: The kind of device.
        strategy: How ranks work together.
        precision: The format of numbers.
        devices: This machine's devices, by local rank.
        device_ids: Their indices.
        ranks: This process's place, where somebody has started the ranks; the place of rank zero otherwise.
        num_nodes: Number of machines.
        launched: Whether the ranks exist already.
    """

    accelerator: Accelerator
    strategy: Strategy
    precision: Precision
    devices: list[torch.device]
    device_ids: list[int]
    ranks: Ranks
    num_nodes: int
    launched: bool
    _unbind: Callable[[], None] | None = None

    def start_launcher(self) -> Launcher | None:
        """What makes the other ranks; None where they exist already, or there are none. They start at once."""
        if self.launched or self.strategy.launcher is None or self.ranks.world_size == 1:
            return None
        world = self.ranks.local_world_size
        threads = self.accelerator.threads_per_rank(world)
        return LauncherRegistry.create(self.strategy.launcher, local_world_size=world, threads_per_rank=threads)

    def connect(self, ranks: Ranks) -> torch.device:
        """Take a rank's place: its device, which is returned, its process group, its share of the cores."""
        device = self.devices[ranks.local_rank]
        self.strategy.connect(self.accelerator, device, ranks)
        if not self.launched or self._take_share_of_cores(ranks):
            cores = self.accelerator.cores_of_rank(ranks.local_rank, ranks.local_world_size)
            self._unbind = affinity.keep_to(cores) if cores else None
        return device

    def disconnect(self) -> None:
        """Undo `connect`."""
        self.strategy.disconnect()
        if self._unbind is not None:
            self._unbind()
            self._unbind = None

    def _take_share_of_cores(self, ranks: Ranks) -> bool:
        """Compute with the threads that are this rank's, which its launcher may have bound to cores of its own.

        Returns:
            Whether it has not: all ranks of this machine may run on the same cores.
        """
        mine = affinity.cores()
        everyone = distributed.gather_objects((ranks.node_rank, mine))
        here = [theirs for node, theirs in everyone if node == ranks.node_rank]
        threads = self.accelerator.threads_per_rank(sum(not mine.isdisjoint(theirs) for theirs in here))
        if threads is not None:
            torch.set_num_threads(threads)
        return all(theirs == mine for theirs in here)


def choose_hardware(
    accelerator: str | Accelerator,
    strategy: str | Strategy,
    devices: int | str | Sequence[int],
    num_nodes: int,
    precision: Any,
    plugins: Any,
) -> Hardware:
    """Turn the Trainer's arguments into objects.

    Raises:
        MisconfigurationException: For anything unknown, unavailable or contradictory, saying what would have worked.
    """
    extras = list(plugins) if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    extras += strategy.plugins if isinstance(strategy, Strategy) else ()
    for extra in extras:
        if not isinstance(extra, (Precision, ClusterEnvironment, CheckpointIO)):
            raise MisconfigurationException(
                f"plugins holds {extra!r} ({type(extra).__name__}); give instances of Precision, ClusterEnvironment or "
                "CheckpointIO"
            )
    if isinstance(accelerator, str) and accelerator in StrategyRegistry:
        accelerator, strategy = "auto", accelerator if strategy == "auto" else strategy
    chosen = _accelerator(accelerator)
    environment = _environment(extras)
    ranks = environment.ranks() if environment is not None else None
    if environment is not None:
        environment.export()
    if ranks is not None and devices == "auto":
        devices = os.environ.get("LIGHTLITE_DEVICES", ranks.local_world_size)
        devices = [int(index) for index in devices.split(",")] if isinstance(devices, str) else devices
    ids = type(chosen).parse_devices(devices)
    if ranks is None:
        if num_nodes != 1:
            raise MisconfigurationException(
                f"num_nodes={num_nodes}, but nobody has started ranks on several machines; start the script on "
                f"each of them with `python -m lightlite.launch --nnodes {num_nodes} …`, torchrun or srun"
            )
        ranks, launched = Ranks(world_size=len(ids), local_world_size=len(ids)), False
    else:
        launched = True
        _check_topology(environment, ranks, ids, num_nodes, devices)
    policy = _strategy(strategy, ranks.world_size)
    if policy.launcher is None and ranks.world_size > 1:
        raise MisconfigurationException(
            f"strategy={strategy!r} works on one device, but {ranks.world_size} were asked for; use strategy='ddp'"
        )
    writers = [extra for extra in extras if isinstance(extra, CheckpointIO)]
    if len(writers) > 1:
        raise MisconfigurationException(f"plugins={writers!r}: give one CheckpointIO")
    policy.checkpoint_io = writers[0] if writers else TorchCheckpointIO()
    found = type(chosen).get_parallel_devices(ids)
    policy.precision = _precision(precision, extras, found[0].type)
    return Hardware(
        accelerator=chosen,
        strategy=policy,
        precision=policy.precision,
        devices=found,
        device_ids=ids,
        ranks=ranks,
        num_nodes=ranks.num_nodes,
        launched=launched,
    )


def _check_topology(environment: Any, ranks: Ranks, ids: list[int], num_nodes: int, devices: Any) -> None:
    """Compare what was started with what was asked for; the other ranks hear of it where this one leaves.

    Raises:
        MisconfigurationException: With expected and actual numbers, and the command that would start the expected.
    """
    nodes = ranks.num_nodes if num_nodes == 1 else num_nodes  # 1 is the default, and says nothing
    if len(ids) == ranks.local_world_size and nodes == ranks.num_nodes:
        return
    if len(ids) != ranks.local_world_size:
        expected = f"devices={devices!r} expects {_counted(len(ids), 'process', 'es')} on each machine"
        actual = f"{environment.name} started {ranks.local_world_size} on this one ({ranks.world_size} in all)"
        instead = f"devices={ranks.local_world_size}, or leave devices out"
    else:
        expected = f"num_nodes={num_nodes} expects {_counted(num_nodes, 'machine')}"
        actual = f"{environment.name} started {_counted(ranks.world_size, 'process', 'es')} on {ranks.num_nodes}"
        instead = f"num_nodes={ranks.num_nodes}, or leave num_nodes out"
    command = environment.command.format(nodes=nodes, processes=len(ids), total=nodes * len(ids))
    start = f"start them with `{command}`, or " if command else ""
    message = f"{expected}, but {actual}; {start}give {instead}"
    if ranks.world_size > 1:
        distributed.withdraw(ranks, message)
    raise MisconfigurationException(message)


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _accelerator(given: str | Accelerator) -> Accelerator:
    if isinstance(given, Accelerator):
        return given
    _refuse_left_out("accelerator", given, AcceleratorRegistry)
    name = os.environ.get("LIGHTLITE_ACCELERATOR", "auto") if given == "auto" else given
    groups = AcceleratorRegistry.groups
    if name in groups:
        found = AcceleratorRegistry.first_available(name)
        if found is None:
            reasons = "; ".join(
                f"{member}: {AcceleratorRegistry.unavailable_reason(member)}" for member in groups[name]
            )
            raise MisconfigurationException(
                f"accelerator={name!r}, but there is none to use ({reasons}); available: {_available()}, or 'auto'"
            )
        name = found
    if name not in AcceleratorRegistry:
        raise _unknown("accelerator", name, AcceleratorRegistry, tuple(groups))
    if reason := AcceleratorRegistry.unavailable_reason(name):
        raise MisconfigurationException(
            f"accelerator={name!r} cannot be used here: {reason}; available: {_available()}, or 'auto'"
        )
    return AcceleratorRegistry.create(name)


def _available() -> str:
    return ", ".join(map(repr, AcceleratorRegistry.available()))


def _strategy(given: str | Strategy, world_size: int) -> Strategy:
    if isinstance(given, Strategy):
        return given
    _refuse_left_out("strategy", given, StrategyRegistry)
    if given in StrategyRegistry.groups:
        members = StrategyRegistry.groups[given]
        given = next(name for name in members if world_size == 1 or StrategyRegistry.get(name).launcher is not None)
    if given not in StrategyRegistry:
        raise _unknown("strategy", given, StrategyRegistry, tuple(StrategyRegistry.groups))
    return StrategyRegistry.create(given)


def _precision(given: Any, extras: list[Any], device: str) -> Precision:
    plugin = next((extra for extra in extras if isinstance(extra, Precision)), None)
    if plugin is not None:
        if given is not None:
            raise MisconfigurationException(
                f"precision={given!r} and plugins={plugin!r} both set the precision; give one"
            )
        return plugin
    name = str(32 if given is None else given)
    _refuse_left_out("precision", name, PrecisionRegistry)
    name = PRECISIONS.get(name, name)
    if name not in PrecisionRegistry:
        raise _unknown("precision", given, PrecisionRegistry, tuple(PRECISIONS))
    return PrecisionRegistry.create(name, device=device)


def _environment(extras: list[Any]) -> ClusterEnvironment | None:
    given = next((extra for extra in extras if isinstance(extra, ClusterEnvironment)), None)
    if given is not None:
        return given
    for name, plugin in EnvironmentRegistry.loadable().items():
        if plugin.detect():
            return EnvironmentRegistry.create(name)
    return None


def _unknown(argument: str, given: Any, registry: Registry[Any], more: tuple[str, ...]) -> MisconfigurationException:
    names = ", ".join(map(repr, [*more, *registry.names()]))
    usable = ""
    if argument == "accelerator":
        usable = f"; available on this machine: {_available()}"
    return MisconfigurationException(f"{argument}={given!r} is unknown; registered: {names}{usable}")


def _refuse_left_out(argument: str, given: Any, registry: Registry[Any]) -> None:
    if isinstance(given, str) and given.startswith(registry.left_out):
        raise MisconfigurationException(f"{argument}={given!r} is left out of lightlite on purpose; see the README")
    if not isinstance(given, str):
        raise MisconfigurationException(
            f"{argument}={given!r} of type {type(given).__name__}; give a name or an instance of "
            f"{argument.capitalize()}"
        )


@dataclass
class Limits:
    """When a fit ends, and how much of the data it sees. Names are the Trainer's arguments."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    overfit_batches: int | float
    val_check_interval: Any
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | float | None
    log_every_n_steps: int | None
    fast_dev_run: int | bool

    def __post_init__(self) -> None:
        if self.fast_dev_run is not False and (not isinstance(self.fast_dev_run, int) or self.fast_dev_run < 0):
            raise MisconfigurationException(
                f"fast_dev_run={self.fast_dev_run!r}; give True for one batch, or a number of batches >= 0"
            )
        if self.fast_dev_run:
            self._shorten(int(self.fast_dev_run))
        self._check_counts()
        for name in ("train", "val", "test", "predict"):
            argument = f"limit_{name}_batches"
            limit = getattr(self, argument)
            setattr(self, argument, check_share(1.0 if limit is None else limit, argument))
        check_share(self.overfit_batches, "overfit_batches")
        if self.overfit_batches:
            self.limit_train_batches = self.overfit_batches
            self.limit_val_batches = self.overfit_batches
        steps = 2 if self.num_sanity_val_steps is None else self.num_sanity_val_steps
        self.num_sanity_val_steps = math.inf if steps == -1 else steps
        if self.min_epochs is None and self.min_steps is not None:
            self.min_epochs = 1
        self.log_every_n_steps = 50 if self.log_every_n_steps is None else self.log_every_n_steps
        self.val_check_time: timedelta | None = None
        self._read_val_check_interval()

    def _shorten(self, batches: int) -> None:
        rank_zero_info(f"fast_dev_run: {batches} batch(es) of each stage; no logging, no checkpoints")
        self.max_epochs, self.max_steps, self.min_epochs, self.min_steps = 1, batches, None, None
        self.limit_train_batches = self.limit_val_batches = batches
        self.limit_test_batches = self.limit_predict_batches = batches
        self.num_sanity_val_steps, self.val_check_interval, self.check_val_every_n_epoch = 0, 1.0, 1

    def _check_counts(self) -> None:
        for name, least in (
            ("max_epochs", -1),
            ("min_epochs", 0),
            ("max_steps", -1),
            ("min_steps", 0),
            ("num_sanity_val_steps", -1),
            ("log_every_n_steps", 0),
            ("check_val_every_n_epoch", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                allowed = f"an int >= {least}" + (", where -1 means no limit" if least == -1 else "")
                raise MisconfigurationException(f"{name}={value!r}; give {allowed}")

    def _read_val_check_interval(self) -> None:
        given = 1.0 if self.val_check_interval is None else self.val_check_interval
        if isinstance(given, (str, dict, timedelta)):
            self.val_check_time = duration(given, "val_check_interval")
            given = 1.0
        elif (
            isinstance(given, bool)
            or not isinstance(given, (int, float))
            or not given > 0
            or (isinstance(given, float) and given > 1.0)
        ):
            raise MisconfigurationException(_bad_interval(given))
        if self.check_val_every_n_epoch is None and isinstance(given, float) and self.val_check_time is None:
            raise MisconfigurationException(
                f"val_check_interval={given} with check_val_every_n_epoch=None counts batches across epochs; "
                "give an int"
            )
        self.val_check_interval = given


def bound_epochs(max_epochs: int | None, max_steps: int, has_max_time: bool) -> int:
    """How many epochs a fit may take: what was asked for, else no limit beside another one, else 1000."""
    if max_epochs is not None:
        return max_epochs
    if max_steps != -1 or has_max_time:
        return -1
    rank_zero_warn("max_epochs was not set: it is 1000. For training without a limit, set max_epochs=-1.")
    return 1000


def _bad_interval(given: Any) -> str:
    return (
        f"val_check_interval={given!r}; give a float above 0.0 and up to 1.0 (share of an epoch), an int >= 1 "
        "(number of batches), or a duration ('00:12:00:00', a dict for timedelta, a timedelta)"
    )


def check_share(value: Any, name: str) -> Any:
    """A number of batches, or a share of them.

    Raises:
        MisconfigurationException: For anything but an int >= 0 or a float from 0.0 to 1.0.
    """
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if not sound or (isinstance(value, float) and value > 1.0):
        raise MisconfigurationException(
            f"{name}={value!r}; give an int >= 0 (number of batches) or a float from 0.0 to 1.0 (share of them)"
        )
    return value


def duration(given: Any, name: str) -> timedelta:
    """A time span from "DD:HH:MM:SS", a dict of timedelta's arguments, or a timedelta.

    Raises:
        MisconfigurationException: For anything else.
    """
    try:
        if isinstance(given, timedelta):
            return given
        if isinstance(given, dict):
            return timedelta(**given)
        days, hours, minutes, seconds = (int(part) for part in given.split(":"))
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except (TypeError, ValueError, AttributeError):
        raise MisconfigurationException(
            f"{name}={given!r}; give 'DD:HH:MM:SS', a dict such as {{'hours': 3}}, or a datetime.timedelta"
        ) from None


def patience(given: Any) -> timedelta:
    """The argument `timeout`: seconds, or whatever `duration` takes.

    Raises:
        MisconfigurationException: For anything else, and for nothing or less.
    """
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    try:
        span = timedelta(seconds=given) if is_number else duration(given, "timeout")
    except MisconfigurationException as error:
        raise MisconfigurationException(f"{error}, or a number of seconds") from None
    if span <= timedelta(0):
        raise MisconfigurationException(f"timeout={given!r}; give more than 0 seconds, or None for the default")
    return span


def check_clipping(value: Any, algorithm: Any) -> None:
    """The arguments `gradient_clip_val` and `gradient_clip_algorithm`.

    Raises:
        MisconfigurationException: Saying what is allowed.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        raise MisconfigurationException(f"gradient_clip_val={value!r}; give a number >= 0, or None for no clipping")
    if algorithm is not None and str(algorithm).lower() not in ("norm", "value"):
        raise MisconfigurationException(f"gradient_clip_algorithm={algorithm!r}; allowed are 'norm' and 'value'")


def check_count(value: Any, name: str, least: int) -> None:
    """An int of at least `least`.

    Raises:
        MisconfigurationException: For anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationException(f"{name}={value!r}; give an int >= {least}")


def profiler(given: Any) -> Profiler:
    """The argument `profiler`: a name, an instance, or None for one that records nothing.

    Raises:
        MisconfigurationException: For anything else.
    """
    if isinstance(given, Profiler):
        return given
    if given is None:
        return PassThroughProfiler()
    kind = PROFILERS.get(given.lower()) if isinstance(given, str) else None
    if kind is None:
        raise MisconfigurationException(
            f"profiler={given!r} ({type(given).__name__}): give {', '.join(map(repr, PROFILERS))}, an instance of "
            "lightlite.profilers.Profiler, or None"
        )
    return kind()


def as_instances(given: Any, kind: type[Instance], name: str, more: str = "") -> list[Instance]:
    """A list of `kind` from one or several.

    Raises:
        MisconfigurationException: For anything that is none.
    """
    instances = [given] if isinstance(given, kind) else list(given) if isinstance(given, (list, tuple, set)) else None
    wrong = [given] if instances is None else [one for one in instances if not isinstance(one, kind)]
    if instances is None or wrong:
        raise MisconfigurationException(
            f"{name}={given!r} holds {wrong[0]!r} ({type(wrong[0]).__name__}); give an instance of lightlite's "
            f"{kind.__name__}, a list of them, {more or 'or None'}"
        )
    return instances


def check_barebones(
    logger: Any, checkpointing: Any, bar: Any, summary: Any, fast_dev_run: Any, detect_anomaly: Any, profiler: Any
) -> None:
    """`barebones=True` switches things off that must not be asked for at the same time.

    Raises:
        MisconfigurationException: Naming the argument.
    """
    asked = {
        "logger": logger not in (None, False),
        "enable_checkpointing": bool(checkpointing),
        "enable_progress_bar": bool(bar),
        "enable_model_summary": bool(summary),
        "fast_dev_run": bool(fast_dev_run),
        "detect_anomaly": bool(detect_anomaly),
        "profiler": profiler is not None,
    }
    wrong = [name for name, wanted in asked.items() if wanted]
    if wrong:
        raise MisconfigurationException(f"barebones=True switches off {', '.join(wrong)}; leave out one or the other")


def set_algorithms(accelerator: Accelerator, deterministic: bool | str | None, benchmark: bool | None) -> None:
    """Settings of torch, and of the accelerator's libraries, that hold for the whole process.

    Args:
        accelerator: The accelerator.
        deterministic: True for deterministic algorithms only, "warn" to be warned of others.
        benchmark: Whether libraries look for the fastest algorithms by trying them; None to leave that as it is.

    Raises:
        MisconfigurationException: For another value of `deterministic`.
    """
    if deterministic not in (None, True, False, "warn"):
        raise MisconfigurationException(f"deterministic={deterministic!r}; give True, False or 'warn'")
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    accelerator.set_algorithms(bool(deterministic), benchmark)
