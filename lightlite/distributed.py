"""Ranks and what they say to each other: the only file of the core that knows `torch.distributed`.

Everything here works with one process too, where it costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightlite.errors import MisconfigurationException

DEFAULT_TIMEOUT = timedelta(minutes=30)
START_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for one another at the beginning, even where they are to be less patient later."""
PATIENCE_BEFORE_FORK = 0.2
"""Seconds, at most, that a fork waits for other threads to come to rest."""
WITHDRAW_TIMEOUT = timedelta(seconds=5)
"""How long a rank that cannot take part tries to reach the others, to say so."""

RANK_VARIABLES = (
    ("RANK", "LOCAL_RANK"),
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_ID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
)
"""Where launchers put a process's rank, each with a variable without which it is left over from something else."""

_joins = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """One process's place among the processes of a run.

    Attributes:
        rank: Global rank, 0 … world_size - 1.
        local_rank: Rank on this machine; chooses the device.
        node_rank: Which machine.
        world_size: Processes of the run, over all machines.
        local_world_size: Processes of the run on this machine.
        store: `(host, port)` of the key-value store at which the ranks meet. None means the one that
            the environment variables MASTER_ADDR and MASTER_PORT name.
    """

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    store: tuple[str, int] | None = None

    @property
    def num_nodes(self) -> int:
        """Number of machines, taking every machine to run the same number of processes."""
        return -(-self.world_size // self.local_world_size)


def join(ranks: Ranks, backend: str, timeout: timedelta = DEFAULT_TIMEOUT) -> bool:
    """Form the process group of the run. Does nothing if it stands already.

    Args:
        ranks: This process's place.
        backend: `torch.distributed` backend for the device's tensors, e.g. "gloo" or "nccl". Tensors
            on the CPU always travel by gloo, so that objects need no device.
        timeout: How long a collective may wait for a missing rank. To form the group, the ranks wait for
            `START_TIMEOUT` at least: they may have much to import.

    Returns:
        Whether this call formed the group, so that the caller has to `leave` it.
    """
    if dist.is_initialized():
        return False
    if ranks.num_nodes == 1:
        loopback = "lo0" if os.uname().sysname == "Darwin" else "lo"
        for variable in {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} - os.environ.keys():
            os.environ[variable] = loopback
            _variables_set.add(variable)
    backends = backend if backend == "gloo" or ":" in backend else f"cpu:gloo,{_device_of(backend)}:{backend}"
    store: dist.Store
    patience = max(timeout, START_TIMEOUT)
    if ranks.store is not None:
        host, port = ranks.store
        store = dist.TCPStore(host, port, ranks.world_size, is_master=False, timeout=patience)
    elif ranks.world_size == 1:
        store = dist.HashStore()
    else:
        found, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=patience))
        # the launcher's store outlives the group, whose addresses the next group must not find there
        store = dist.PrefixStore(f"join{next(_joins)}", found)
    _check_in(store, ranks, patience)
    global _stores
    _stores = itertools.count()
    hook = sys.excepthook
    dist.init_process_group(backends, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    # A rank that failed from here on would leave another for half an hour with the forming of its connection to it.
    _meet(store, "joined", ranks, patience)
    if ranks.store is not None:
        sys.excepthook = hook  # torch's own would mark with a rank what the script raises long after the run
    return True


def _check_in(store: dist.Store, ranks: Ranks, patience: timedelta) -> None:
    """Wait for every rank, or for the word of one that will not come."""
    _meet(store, "go", ranks, patience)
    if why := store.get("go").decode():
        _hear(store, ranks)
        raise MisconfigurationException(why)


def _meet(store: dist.Store, sign: str, ranks: Ranks, patience: timedelta) -> None:
    """Wait until every rank is here, or one has given the sign already."""
    if store.add(f"here for {sign}", 1) == ranks.world_size:
        store.set(sign, "")
    store.wait([sign], patience)


def withdraw(ranks: Ranks, why: str) -> None:
    """Tell the ranks that wait in `join` for this one, or will in a few seconds, that it does not come.

    Not every launcher ends the ranks that are left when one has failed.

    Args:
        ranks: This process's place.
        why: What the others raise.
    """
    with contextlib.suppress(dist.DistError, ValueError):  # nobody is there
        found, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=WITHDRAW_TIMEOUT))
        store = dist.PrefixStore(f"join{next(_joins)}", found)
        store.set("go", f"rank {ranks.rank} cannot take part: {why}")
        _hear(store, ranks)
        if ranks.rank == 0:  # it may be the one who keeps the store
            store.wait(["all have heard"], WITHDRAW_TIMEOUT)


def _hear(store: dist.Store, ranks: Ranks) -> None:
    if store.add("heard", 1) == ranks.world_size:
        store.set("all have heard", "")


_left: list[Any] = []
_stores = itertools.count()
STORE_TIMEOUT = timedelta(seconds=30)
"""How long a question to a store of `store` may take."""
_variables_set: set[str] = set()
"""What `join` has set of the environment, for `leave` to take away: what the script starts is not of the run."""


@atexit.register
def _end_threads() -> None:
    """End the last group's threads while the interpreter still stands, once they have let go of its lock."""
    leave()
    if _left:
        time.sleep(0.01)
        _left.clear()


def _device_of(backend: str) -> str:
    capable = dist.Backend.backend_capability.get(backend, [])
    return next((device for device in capable if device != "cpu"), "cpu")


def leave() -> None:
    """Dissolve the process group, if there is one.

    The object itself lives on until the next one is left. Gloo's threads need the interpreter's lock to drop the
    tensors of the last collective, and hold a lock of their own meanwhile, for which the group's destructor would
    wait: were it to run right after that collective, under the interpreter's lock, neither would ever go on.
    """
    if not dist.is_available():
        return
    if dist.is_initialized():
        group = dist.group.WORLD
        dist.destroy_process_group()
        _left[:] = [group]
    while _variables_set:
        os.environ.pop(_variables_set.pop(), None)
    # Torch numbers groups, and a join that failed has used up a number that new processes will count from again.
    dist.distributed_c10d._world.group_count = 0


def _let_threads_rest() -> None:
    """Before a fork, such as that of a loader worker: wait until torch's threads are at rest.

    A thread of gloo's that drops the tensors of a collective enters and leaves the interpreter, and for a moment holds
    the lock of its list of threads. CPython 3.11 takes no care of that lock when it forks: the child then waits for it
    for ever.
    """
    if sys.platform != "linux" or not is_joined():
        return
    deadline = time.monotonic() + PATIENCE_BEFORE_FORK
    while _torch_runs() and time.monotonic() < deadline:
        time.sleep(0.0005)


os.register_at_fork(before=_let_threads_rest)


def _torch_runs() -> bool:
    """Whether a thread that torch has named ("pt_gloo_runloop", "pt_nccl_…") is running at this moment."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/stat", "rb") as file:
            name, _, rest = file.read().rpartition(b")")
            if b"(pt_" in name and rest.split()[0] == b"R":
                return True
    return False


def is_joined() -> bool:
    """Whether this process is one of a group of ranks now."""
    return bool(dist.is_available() and dist.is_initialized())


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it, collective calls concern this process only: for when other ranks may be gone."""
    global _alone
    outer, _alone = _alone, True
    try:
        yield
    finally:
        _alone = outer


def store(name: str) -> dist.Store:
    """A store of the group's, new for each call, with a connection of its own, for use in a thread.

    Args:
        name: What it is for. Every rank has to ask for the same stores, in the same order.
    """
    default: Any = dist.distributed_c10d._get_default_store()
    whole: dist.Store = default.clone()
    whole.set_timeout(STORE_TIMEOUT)
    return dist.PrefixStore(f"{name}{next(_stores)}", whole)


def world_size() -> int:
    """Number of ranks in the group; 1 outside of one."""
    return dist.get_world_size() if is_joined() and not _alone else 1


def rank() -> int:
    """This process's global rank: the group's, else what the launcher's environment says, else 0."""
    if is_joined():
        return dist.get_rank()
    for variable, beside in RANK_VARIABLES:
        value = os.environ.get(variable)
        if value is not None and value.isdigit() and beside in os.environ:
            return int(value)
    return 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank `source`'s `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def all_reduce(value: Tensor, op: str = "mean") -> Tensor:
    """The sum, mean, min, max or product of `value` over the ranks, as a new tensor of its shape.

    Args:
        value: Same shape and dtype on every rank; integers are averaged as float32.
        op: "sum", "mean" (or "avg"), "min", "max" or "product".
    """
    if world_size() == 1:
        return value.clone()
    average = op in ("mean", "avg")
    if average and not value.is_floating_point() and not value.is_complex():
        value = value.float()
    result = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=dist.ReduceOp.SUM if average else getattr(dist.ReduceOp, op.upper()))
    return result / world_size() if average else result


def all_gather(value: Tensor) -> list[Tensor]:
    """Every rank's `value`, by rank; all of one shape."""
    if world_size() == 1:
        return [value]
    gathered = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, value.detach().contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return torch.stack(all_gather(value))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient, "sum")[rank() if world_size() > 1 else 0]


def gather_with_grad(value: Tensor) -> Tensor:
    """Every rank's `value`, stacked by rank; its gradient is the sum of those of all ranks' results.

    The backward pass is a collective call, too.
    """
    return _Gather.apply(value)  # type: ignore[no-any-return, no-untyped-call]


def broadcast(value: Tensor, source: int = 0) -> None:
    """Overwrite `value` in place by rank `source`'s, where there are several ranks."""
    if world_size() > 1:
        dist.broadcast(value, src=source)
