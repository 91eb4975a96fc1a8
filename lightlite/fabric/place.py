"""A process's place among the ranks of a loop of one's own: how it is taken, and what the ranks say to each other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightlite import distributed
from lightlite.config import Hardware
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator, Launcher, Strategy
from lightlite.nest import apply_to_tensors, as_tensors
from lightlite.registry import LauncherRegistry
from lightlite.utilities import seed as seeds


class Place:
    """What Fabric knows of hardware and ranks.

    Args:
        hardware: What a run computes on.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._ranks = hardware.ranks
        self._launcher: Launcher | None = None
        self._launched = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have a subclass's `run` run on every rank."""
        super().__init_subclass__(**kwargs)
        if "run" in vars(cls):
            cls.run = _on_every_rank(cls.run)  # type: ignore[method-assign]

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self._hardware.accelerator

    @property
    def strategy(self) -> Strategy:
        """How the ranks work together."""
        return self._hardware.strategy

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self._hardware.devices[self._ranks.local_rank]

    @property
    def global_rank(self) -> int:
        """This process's rank in the run."""
        return self._ranks.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return self._ranks.local_rank

    @property
    def node_rank(self) -> int:
        """Which machine this is."""
        return self._ranks.node_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._ranks.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank zero."""
        return self._ranks.rank == 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What a subclass overrides: called as `fabric.run(…)`, it runs on every rank; returns rank zero's result."""

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run `function(fabric, *args, **kwargs)` on every rank.

        With one device it is simply called, and so it is under `python -m lightlite.launch`, torchrun, srun or mpirun,
        which have started the ranks. Otherwise this process is rank zero, the function is sent to helper processes
        which are the others, and afterwards they and what they held are gone; modules are bare again. Ranks that are
        started so begin with rank zero's random state.

        Without a function, what follows the call is to run on every rank. Where nobody has started them, this process
        becomes `python -m lightlite.launch`, which runs the script from its beginning on each.

        Args:
            function: What to run, or None.
            args: For it.
            kwargs: For it.

        Returns:
            What the function returned on rank zero; on the other ranks, what it returned there.

        Raises:
            TypeError: For something that is no function, or takes no argument.
            MisconfigurationException: Without a function, where the ranks are yet to be started and there is no script
                to start over: in a notebook, a shell, or an installed program.
            NotSendableError: Naming what the function uses that cannot be sent to other ranks.
            Exception: What the function raised on the first rank to fail.
        """
        if function is None:
            if self._lacks_ranks:
                launcher = LauncherRegistry.get(str(self.strategy.launcher))
                launcher.start_over(type(self.accelerator).name, self._hardware.device_ids)
            self._take_place()
            return None
        if not callable(function):
            raise TypeError(
                f"fabric.launch({function!r}); give a function, as in fabric.launch(train), not what it returns"
            )
        if not _takes_fabric(function):
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(f"fabric.launch({name}): it is called with the Fabric, so define it as {name}(fabric, …)")
        return self._start(function, self, *args, **kwargs)

    def _start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function on every rank, whoever starts them."""
        if not self._lacks_ranks:
            self._take_place()
            return function(*args, **kwargs)
        if self._launcher is None:
            self._launcher = self._hardware.start_launcher()
        assert self._launcher is not None
        return self._launcher.run(_run_in_place, self, function, args, kwargs)

    @property
    def _lacks_ranks(self) -> bool:
        return not self._launched and not self._hardware.launched and self.world_size > 1

    def _take_place(self) -> None:
        """Take this process's place among the ranks, unless it has done so.

        Raises:
            MisconfigurationException: Where the ranks are yet to be started.
        """
        if self._lacks_ranks:
            raise MisconfigurationException(
                f"Fabric(devices=…) asks for {self.world_size} ranks, and nobody has started them yet; call "
                "fabric.launch(train) with a function train(fabric) that they are to run, or fabric.launch() to start "
                "the script over on each, before anything else"
            )
        if not self._launched:
            self._connect(self._ranks)

    def _connect(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._hardware.connect(ranks)
        self._launched = True

    def _disconnect(self) -> None:
        """The ranks part."""
        self._hardware.disconnect()
        self._ranks, self._launched = self._hardware.ranks, False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each machine only."""
        if self.local_rank == 0:
            print(*args, **kwargs)  # noqa: T201

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank."""
        self._take_place()
        self.strategy.barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s object, on every rank."""
        self._take_place()
        return self.strategy.broadcast(obj, src)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Every rank's tensors or numbers, stacked.

        Args:
            data: A tensor, a number, a NumPy array, or a nest of them, of the same shapes on every rank.
            group: Accepted for compatibility; the whole world.
            sync_grads: Whether gradients flow back, to every rank's tensor.

        Returns:
            The nest with tensors of shape (world_size, *shape); with one rank, of their own shape.
        """
        self._take_place()
        data = as_tensors(data, self.device)
        if self.world_size == 1:
            return data
        return apply_to_tensors(data, lambda tensor: self.strategy.all_gather(tensor, group, sync_grads))

    def all_reduce(self, data: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Tensors or numbers reduced over the ranks, on every rank.

        Args:
            data: A tensor, a number, a NumPy array, or a nest of them, of the same shapes on every rank. Tensors are
                overwritten, except integers by their mean.
            group: Accepted for compatibility; the whole world.
            reduce_op: "sum", "mean" (or "avg"), "min", "max", "product", or a `torch.distributed.ReduceOp`.

        Returns:
            The nest, reduced.
        """
        self._take_place()
        name = str(getattr(reduce_op, "name", reduce_op)).lower()

        def reduce(tensor: Tensor) -> Tensor:
            reduced = self.strategy.reduce(tensor, group, name)
            return tensor.detach().copy_(reduced) if reduced.dtype == tensor.dtype else reduced

        return apply_to_tensors(as_tensors(data, self.device), reduce)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """A block that rank zero runs first, and the others once it is done, such as a download.

        Args:
            local: Whether each machine has a first rank of its own.
        """
        first = (self.local_rank if local else self.global_rank) == 0
        if not first:
            self.barrier()
        yield
        if first:
            self.barrier()

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed all random generators; see `lightlite.seed_everything`. `workers` is True unless given."""
        return seeds.seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)


def _on_every_rank(run: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `run`, which starts the ranks; within it, `super().run()` does not."""

    @functools.wraps(run)
    def launched(self: Place, *args: Any, **kwargs: Any) -> Any:
        return self._start(run, self, *args, **kwargs)

    return launched


def _run_in_place(
    ranks: Ranks, fabric: Place, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One rank's part in a run that was started from the script."""
    try:
        fabric._connect(ranks)
        _start_alike()
        result = function(*args, **kwargs)
    except BaseException:
        with distributed.alone():  # others may be gone
            fabric._disconnect()
        raise
    fabric._disconnect()
    return result


def _start_alike() -> None:
    """Give every rank rank zero's random state, as if the script had been run on each."""
    state, seed = distributed.broadcast_object((seeds.capture_rng(), torch.initial_seed()))
    if distributed.rank() > 0:
        torch.manual_seed(seed)
        seeds.restore_rng(state)


def _takes_fabric(function: Callable[..., Any]) -> bool:
    try:
        return bool(inspect.signature(function).parameters)
    except ValueError:  # some built-in functions have no signature
        return True
