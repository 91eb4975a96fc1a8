"""What the core asks of hardware, of ranks, of numbers and of processes.

Hardware and distribution vary independently, so they are two small interfaces: an `Accelerator` knows a
kind of device and nothing of other ranks; a `Strategy` knows how ranks work together and nothing of a
kind of device. `Precision` knows the format of numbers, `Launcher` knows processes, `ClusterEnvironment`
knows who started this process. The core knows these five and no implementation of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException

T = TypeVar("T")


class Accelerator(ABC):
    """One kind of hardware. Method names follow Lightning's `Accelerator` where that has the method.

    A third party subclasses this, and declares the class under the entry-point group
    `lightlite.accelerators`; `Trainer(accelerator="name")` then works.
    """

    name: ClassVar[str]
    """What `Trainer(accelerator=…)` calls it; the `torch.device` type, too, unless `get_parallel_devices` differs."""

    process_group_backend: ClassVar[str] = "gloo"
    """`torch.distributed` backend that carries this device's tensors."""

    pin_memory: ClassVar[bool] = False
    """Whether copies to the device are faster from page-locked memory."""

    float64: ClassVar[bool] = True
    """Whether the device computes in double precision."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Whether this machine has at least one such device that works."""

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why the device cannot be used here, as one sentence; None where it can."""
        return None if cls.is_available() else f"no {cls.name} device was found on this machine"

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """How many devices `devices="auto"` takes. Must not initialise the device's driver in this process."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: int | str | Sequence[int]) -> list[int]:
        """Device indices meant by a `devices=` argument.

        Args:
            devices: A count, -1 or "auto" for all, a list of indices, or a string of either ("2", "0,3");
                `lightlite.plugins.devices.read_devices` tells which.

        Raises:
            MisconfigurationException: For zero, for more than there are, for indices that do not exist; the
                message says how many there are and what to type.
        """

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """The `torch.device` of each index."""

    def setup_device(self, device: torch.device) -> None:
        """Make `device` the current one, before anything is allocated on it."""

    def teardown(self) -> None:
        """Release what the run held on the device."""

    def move_module(self, module: nn.Module, device: torch.device) -> None:
        """Move parameters and buffers to `device`, or back to the CPU, in place: the parameters are the same objects.

        Nothing is copied that is there already.
        """
        module.to(device)

    def set_algorithms(self, deterministic: bool, benchmark: bool | None) -> None:
        """Settings of the device's libraries, for the whole process; torch's own are made already.

        Args:
            deterministic: Whether to use deterministic algorithms only; False leaves that as it is.
            benchmark: Whether to look for the fastest algorithms by trying them; None leaves that as it is.
        """

    @abstractmethod
    def batch_mover(self, device: torch.device) -> Callable[[Any], Any] | None:
        """A function that moves any nest of tensors to `device`, or None where batches are there already.

        None is what spares the CPU a walk through every batch. `lightlite.nest.move_to` moves a nest.
        """

    def background_mover(self, device: torch.device) -> Callable[[Any], Callable[[], Any]] | None:
        """A function that begins to move a nest to `device`, beside what the device computes; None where it cannot.

        It returns at once, and what it returns is called once, when the nest is wanted: to give the moved nest, ready
        for what is computed from then on. What has been begun may also be dropped.
        """
        return None

    def random_state(self, device: torch.device) -> Any:
        """State of the device's own random generator, as plain data or tensors on the CPU; None without one."""
        return None

    def set_random_state(self, state: Any, device: torch.device) -> None:
        """Put back what `random_state` returned."""

    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done what it was given."""

    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        """Memory and utilisation figures; keys name the unit, as in "memory_used_bytes", "utilization_percent"."""
        return {}

    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """Operations a second that the maker promises for dense matrices of `dtype`; None where that is not known."""
        return None

    def external_profiler(self) -> AbstractContextManager[Any] | None:
        """Context in which the maker's own profiler records this process; None where there is none."""
        return None

    def threads_per_rank(self, local_world_size: int) -> int | None:
        """CPU threads that each of `local_world_size` ranks should compute with; None to leave torch's choice."""
        return None

    def cores_of_rank(self, local_rank: int, local_world_size: int) -> set[int] | None:
        """CPU cores that a rank should keep to, of those that it may use; None to leave it where it is."""
        return None

    def advice(self, error: BaseException) -> str:
        """What to do about an error of this device's, where its message does not say; empty for nothing."""
        return ""


class Precision:
    """The format that numbers are computed and kept in."""

    precision: str = "32-true"
    scaler: torch.amp.GradScaler | None = None
    """Scales losses so that half-precision gradients do not vanish; None where that is not needed."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Bring parameters and buffers to the format they are kept in, in place."""
        return module

    def input_converter(self) -> Callable[[Any], Any] | None:
        """A function that brings a batch's floating-point tensors to the format; None where nothing is to do."""
        return None

    def forward_context(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """A factory of the context that steps run in (autocast), or None where none is needed."""
        return None

    def output_converter(self) -> Callable[[Any], Any] | None:
        """A function that brings a forward's floating-point outputs back to torch's default format; None for nothing.

        For a user's own loop, whose loss is computed outside of `forward_context`.
        """
        return None

    def init_context(self) -> AbstractContextManager[Any]:
        """A context in which new tensors have the format that parameters are kept in."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep, under the class's qualified name; empty if nothing."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class CheckpointIO(ABC):
    """Writes, reads and removes checkpoint files. Given as `Trainer(plugins=…)`; rank zero writes and removes.

    The methods that have to be there are those of Lightning's class of the same name.

    Attributes:
        on_failure: Called, from whatever thread, when what was saved before turns out not to have been: so that the
            loop looks, by `wait(0)`, before long.
    """

    on_failure: Callable[[], None] | None = None

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save what a checkpoint holds.

        Args:
            checkpoint: Nested dicts and lists of tensors and plain data. The tensors are the module's own: what is not
                written by the time this returns has to be copied first.
            path: Path or URL.
            storage_options: What `Trainer.save_checkpoint` was given.
        """

    @abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what was saved; nothing is executed by it."""

    @abstractmethod
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint; nothing happens where there is none."""

    def open_checkpoint(self, path: Any) -> dict[str, Any]:
        """Read what was saved, for a rank that needs parts of it only.

        Returns:
            What `load_checkpoint` returns; but of what `save_shards` has written, each tensor may be an object with
            `shape` and `dtype` which reads a part of it when it is indexed by a tuple of slices.
        """
        return self.load_checkpoint(path)

    def save_shards(self, checkpoint: dict[str, Any], path: Any, write: Callable[[dict[str, Any], str], None]) -> None:
        """Save a checkpoint of whose tensors each rank has a part. Called on every rank.

        Args:
            checkpoint: As for `save_checkpoint`, the same nest on every rank.
            path: Path of the folder that it becomes.
            write: Writes a nest of tensors into a folder that is there; every rank has to call it.
        """
        raise MisconfigurationException(
            f"{type(self).__name__} saves what rank zero hands it, and cannot save shards; give the strategy "
            "state_dict_type='full', or leave the CheckpointIO out"
        )

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Get ready for saving these, once a fit has made its first step; by default there is nothing to do."""

    def then(self, action: Callable[[], None]) -> None:
        """Do something with files as soon as what was saved before is on disk; by default it is by now."""
        action()

    def damage(self, path: Any) -> str | None:
        """What is wrong with a checkpoint, so that an older one is better gone on from; None for nothing."""
        return None

    def origin(self, path: Any) -> tuple[str, int]:
        """Which run a checkpoint belongs to, and of which step it is; ("", -1) where that is not known."""
        return "", -1

    def is_pending(self, path: Any) -> bool:
        """Whether a file of that name is on its way to the disk."""
        return False

    def wait(self, seconds: float | None = None) -> None:
        """Wait until what was saved is on disk, at most so long, and raise what kept it from being written."""

    def teardown(self) -> None:
        """A call of the Trainer is over: finish, and release what is held. Another call may follow."""
        self.wait()


class Strategy(ABC):
    """How the ranks of a run work together.

    A third party subclasses this, and declares the class under the entry-point group `lightlite.strategies`;
    `Trainer(strategy="name")` then works. It is made without arguments there.

    Life: `connect` (once a run, on every rank), `setup` (once the module stands), steps, `teardown`.
    The defaults are those of a single process, and of several processes that hold the whole model each.

    Attributes:
        accelerator: The hardware, from `connect` on.
        root_device: This rank's device, from `connect` on.
        ranks: This process's place, from `connect` on.
        module: The user's module, bare, from `setup` on.
        checkpoint_io: What writes and reads checkpoint files.
        plugins: What was given to the strategy of what is else given as `Trainer(plugins=…)`.
        after_step: What has to follow every optimizer step, on every rank; None for nothing. Set by `setup`, for
            automatic optimization.
        precision: The format of numbers.
    """

    name: ClassVar[str]
    checkpoint_io: CheckpointIO
    plugins: Sequence[Any] = ()
    after_step: Callable[[], None] | None = None
    joins: ClassVar[bool] = False
    """Whether gradients may be averaged by `sync_gradients` in a step for which some ranks have no batch, which run
    nothing of the module then."""

    precision: Precision = Precision()
    launcher: ClassVar[str | None] = None
    """Registered name of the launcher that makes the ranks where nobody has made them, such as "helpers", processes of
    this machine; None: one process, and several devices are refused."""

    spreads: ClassVar[bool] = False
    """Whether each rank holds a part of every parameter only, so that running the module takes all ranks, its gradients
    are averaged as soon as they are there, and it cannot be copied."""

    timeout: timedelta = distributed.DEFAULT_TIMEOUT

    accelerator: Accelerator
    root_device: torch.device
    ranks: Ranks = Ranks()
    module: nn.Module

    def connect(self, accelerator: Accelerator, device: torch.device, ranks: Ranks) -> None:
        """Take the place of one rank: choose the device, form the process group, by `lightlite.distributed.join`."""
        self.accelerator, self.root_device, self.ranks = accelerator, device, ranks
        accelerator.setup_device(device)

    def disconnect(self) -> None:
        """Undo `connect`."""

    def configuring(self, module: nn.Module) -> AbstractContextManager[None]:
        """A block, before `setup`, in which the module's `configure_model` runs."""
        return nullcontext()

    @abstractmethod
    def setup(self, module: nn.Module, training: bool) -> Callable[..., Any] | None:
        """Move `module` to the device, make the ranks' copies equal and, if `training`, prepare it for gradient sync.

        A module whose `automatic_optimization` is False is not prepared: for it, `sync_gradients` is called.

        Returns:
            For training, the function that runs `module.training_step(*args)` so that the gradients of the
            loss it returns will be in sync; None otherwise. It is called once a micro-batch.
        """

    def synchronize_batchnorm(self, module: nn.Module) -> None:
        """Have batch normalization compute its statistics over all ranks, from before `setup` until `teardown`.

        Raises:
            MisconfigurationException: Where the strategy cannot.
        """
        raise MisconfigurationException(
            f"sync_batchnorm=True, but {type(self).__name__} cannot compute statistics over ranks; leave it out, or "
            "use strategy='ddp'"
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """Prepare a module of a user's own loop for gradient sync; it is on its device already.

        Returns:
            `module` itself where there is nothing to sync. Otherwise a module which, called as `wrapper(name, *args,
            **kwargs)`, runs the module's method of that name ("forward" for the module itself) so that the gradients of
            what it returns will be in sync; and which has `no_sync()`, the context in which they stay local.
        """
        return module

    def unwrap(self, wrapper: nn.Module) -> None:
        """Make the module of a user's own loop the bare one again, as the ranks are about to part."""

    def teardown(self) -> None:
        """Release the wrapper and the device; the module is the user's bare one again, in the host's memory."""
        if hasattr(self, "module"):
            self.accelerator.move_module(self.module, torch.device("cpu"))
        self.accelerator.teardown()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "module"}

    def no_sync(self) -> AbstractContextManager[Any]:
        """Context in which backward passes leave gradients local, for all but the last of an accumulation."""
        return nullcontext()

    def before_training_epoch(self) -> None:
        """An epoch of training begins: what is trained may have changed since `setup`, by callbacks that unfreeze."""

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average gradients over the ranks after a backward pass that the user ran by hand."""

    def before_evaluation(self, module: nn.Module | None = None) -> None:
        """Make every rank's copy of a module (None: that of `setup`) equal, buffers included, to evaluate it."""

    def after_evaluation(self) -> None:
        """Undo what `before_evaluation` did for the evaluation only, within a fit."""

    def state_dict(self, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """What this rank alone knows that a checkpoint has to keep, as plain data and tensors; empty if nothing.

        A checkpoint holds that of every rank. It is put back where the number of ranks is the same.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Put back what `state_dict` returned, after `setup` and `load_optimizer_state`."""

    def evaluation_step(self, name: str) -> Callable[..., Any]:
        """The function that runs the module's method of that name to evaluate it."""
        return getattr(self.module, name)  # type: ignore[no-any-return]

    def evaluating(self) -> AbstractContextManager[None]:
        """A block in which ranks evaluate different numbers of batches, or none."""
        return nullcontext()

    def part(self, tensor: Any, parameter: Tensor) -> Tensor:
        """What this rank holds of `tensor`, which is of a parameter's shape: as that is held, and where."""
        return tensor.to(parameter.device, parameter.dtype)  # type: ignore[no-any-return]

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, as one process would have it; `whole` puts together what is spread."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Put back `optimizer_state_dict`, its tensors on the parameters' devices."""
        optimizer.load_state_dict(state)

    def module_state_dict(self) -> dict[str, Any]:
        """The bare module's state, with the names the user gave; see `optimizer_state_dict`."""
        return self.module.state_dict()

    def load_module_state(self, state: Mapping[str, Any], strict: bool = True, module: nn.Module | None = None) -> None:
        """Put back `module_state_dict`, of the module (None: that of `setup`, before which it may be called, too)."""
        (self.module if module is None else module).load_state_dict(state, strict=strict)

    def whole(self, state: Any) -> Any:
        """A nest, put together of what is spread over the ranks: on rank zero. A collective call."""
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write what a checkpoint holds. Called on every rank, with the same nest; see `CheckpointIO`."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
        self.barrier("save_checkpoint")

    def load_checkpoint(self, path: Any) -> dict[str, Any]:
        """Read what was written, for the `load_…` methods above."""
        return self.checkpoint_io.load_checkpoint(path)

    def clip_gradients(
        self,
        parameters: list[Tensor],
        value: float,
        algorithm: str,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Clip gradients in place, by their total "norm" or each "value".

        Returns:
            The total norm before, a scalar; None for "value".
        """
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, value)
            return None
        return nn.utils.clip_grad_norm_(parameters, value, norm_type, error_if_nonfinite)

    @property
    def global_rank(self) -> int:
        """This process's rank in the run."""
        return self.ranks.rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return self.ranks.local_rank

    @property
    def node_rank(self) -> int:
        """Which machine this is."""
        return self.ranks.node_rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the run."""
        return self.ranks.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.ranks.rank == 0

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: str = "mean") -> Tensor:
        """`tensor` reduced over the ranks ("sum", "mean", "min", "max", "product"), on every rank."""
        return distributed.all_reduce(tensor, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Every rank's `tensor`, stacked: shape (world_size, *tensor.shape).

        With `sync_grads`, the gradient of `tensor` is the sum of what all ranks' losses make of it.
        """
        return distributed.gather_with_grad(tensor) if sync_grads else torch.stack(distributed.all_gather(tensor))

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Rank `src`'s object, on every rank."""
        return distributed.broadcast_object(obj, src)  # type: ignore[no-any-return]

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank."""
        distributed.barrier()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks (or, with `all=False`, any rank) decided True; the same answer on every rank."""
        decisions = distributed.gather_objects(bool(decision))
        return bool(min(decisions) if all else max(decisions))


class Launcher(ABC):
    """Makes ranks out of one calling process, and runs functions on them. Knows nothing of training."""

    @abstractmethod
    def __init__(self, local_world_size: int, threads_per_rank: int | None = None) -> None:
        """Start getting `local_world_size - 1` processes ready; return at once."""

    @abstractmethod
    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(ranks, *args)` on every rank, with `ranks` its own place; rank 0 is this process.

        Everything reachable from `function` and `args` is sent to the other ranks; here it is used as it is.

        Returns:
            What the function returned here, on rank 0.

        Raises:
            NotSendableError: Naming the attribute that could not be sent; nothing was started.
            Exception: What the first failing rank raised, of its own type, with the remote traceback as its
                cause. The other ranks are gone by then, and `run` may be called again.
        """

    def cause_of(self, error: BaseException) -> BaseException:
        """What `run` is going to raise, where its function raised `error` on rank 0.

        Another rank's failure, if `error` is no more than the echo of it, as a collective call that lost a rank; else
        `error` itself. May wait a few seconds for the other ranks to speak.
        """
        return error

    @classmethod
    def start_over(cls, accelerator: str, devices: Sequence[int]) -> NoReturn:
        """End this process and run its script from the beginning, on a rank for every device.

        Args:
            accelerator: Registered name.
            devices: Indices of this machine's devices.

        Raises:
            MisconfigurationException: Where that cannot be done, saying what can.
        """
        raise MisconfigurationException(
            f"{cls.__name__} cannot start a script over on {len(devices)} ranks; put the code that they are to run "
            "into a function train(fabric) and call fabric.launch(train)"
        )

    @abstractmethod
    def close(self) -> None:
        """End the processes. `run` may start them anew."""


class ClusterEnvironment(ABC):
    """Somebody who started this process as one rank of many, such as torchrun, Slurm or MPI."""

    name: ClassVar[str]
    command: ClassVar[str] = ""
    """What to type to start {processes} ranks on each of {nodes} machines, {total} in all; for messages."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Whether this process was started by it."""

    @abstractmethod
    def ranks(self) -> Ranks:
        """This process's place.

        Raises:
            MisconfigurationException: Where the environment variables contradict one another.
        """

    def export(self) -> None:
        """Set MASTER_ADDR and MASTER_PORT for `torch.distributed`, where the environment calls them otherwise."""

    @staticmethod
    def requeue() -> str:
        """Have this job started again, where it is one of this environment's. Called on rank zero after SIGUSR1.

        Returns:
            Why that was not possible; empty where it was, or where there is no such job.
        """
        return ""


class OutputCollector(ABC):
    """Brings what each rank put in to all ranks, in the order of a single process.

    Used by every rank alike: `put` for each output, then `collect` once. `close` in any case.
    """

    @abstractmethod
    def __init__(self, ranks: Ranks) -> None:
        """Make ready; a collective call over the ranks of a run."""

    @abstractmethod
    def put(self, output: Any) -> None:
        """Set aside this rank's next output. Not held in memory afterwards."""

    @abstractmethod
    def collect(self) -> list[Any]:
        """All outputs: rank 0's first, rank 1's first, …, rank 0's second, … A collective call."""

    @abstractmethod
    def close(self) -> None:
        """Remove whatever `put` left behind, in case `collect` was never reached."""
