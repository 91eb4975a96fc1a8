"""In-script launch: the calling process is rank 0, helper processes are the other ranks and stay warm between runs."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import LaunchError, NotSendableError
from lightlite.interfaces import Launcher
from lightlite.launch import again, network, transport, unsendable
from lightlite.launch.crew import Crew
from lightlite.launch.supervise import Watch

T = TypeVar("T")
Shape = tuple[int, "int | None"]

_crews: dict[Shape, Crew] = {}
_pools: Counter[Shape] = Counter()
_lock = threading.RLock()  # reentrant, for a pool may be collected, and so finalized, while this thread holds it
_run_lock = threading.Lock()
_run_thread: int | None = None
_run_in_main_thread = False


class HelperPool(Launcher):
    """Makes ranks out of the calling process and `local_world_size - 1` helpers, on this machine.

    Pools of the same shape share their helpers, so the second pool of a script finds them warm. They end with
    `close`, with the last pool of their shape, and with this process, however it ends.

    Args:
        local_world_size: Number of ranks, the calling process included.
        threads_per_rank: CPU threads that every rank computes with during a run; None for torch's choice.
            OMP_NUM_THREADS, where the user set it, is obeyed instead.
    """

    def __init__(self, local_world_size: int, threads_per_rank: int | None = None) -> None:
        self._shape: Shape = (local_world_size, threads_per_rank)
        self._watch: Watch | None = None
        if local_world_size > 1:
            with _lock:
                _pools[self._shape] += 1
            weakref.finalize(self, _release, self._shape).atexit = False
            _ready_crew(self._shape)

    def __reduce__(self) -> Any:
        """A pool that travels to a helper, as part of something bigger, starts nothing there."""
        return _dormant_pool, self._shape

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(ranks, *args)` on every rank; see `Launcher.run`.

        Runs take turns, whichever threads and pools they come from: a process can be a member of one group of ranks
        at a time.

        Raises:
            NotSendableError: Naming what could not be sent.
            LaunchError: Where the calling thread is in the middle of a run already.
            Exception: What the first failing rank raised.
        """
        size, threads = self._shape
        if size == 1:
            return function(Ranks(), *args)
        with _turn(), transport.anonymous_file() as file:
            try:
                work = transport.pack((function, args), file)
            except Exception as error:
                raise NotSendableError(_what_cannot_be_sent(function, args, error)) from error
            crew = _ready_crew(self._shape)
            with _LoopbackStore() as store, _threads(threads):
                crew.send(store.address, work, file)
                file.close()
                ranks = Ranks(0, 0, 0, size, size, store.address)
                was_joined = distributed.is_joined()
                try:
                    self._watch = Watch(crew, store.close)
                    return self._watch.run(lambda: function(ranks, *args))
                finally:
                    self._watch = None
                    if not was_joined:
                        distributed.leave()

    def cause_of(self, error: BaseException) -> BaseException:
        """What `run` is going to raise, where its function raised `error`; see `Launcher.cause_of`."""
        return error if self._watch is None else self._watch.cause_of(error)

    @classmethod
    def start_over(cls, accelerator: str, devices: Sequence[int]) -> NoReturn:
        """End all helpers, and run the script on a rank for every device; see `Launcher.start_over`."""
        _end_all()
        again.start_over(accelerator, devices)

    def close(self) -> None:
        """End the helpers. `run` starts them anew, for this pool and for others of its shape."""
        with _lock:
            crew = _crews.pop(self._shape, None)
        if crew is not None:
            crew.end()


def _dormant_pool(local_world_size: int, threads_per_rank: int | None) -> HelperPool:
    pool = HelperPool.__new__(HelperPool)
    pool._shape, pool._watch = (local_world_size, threads_per_rank), None
    return pool


def _ready_crew(shape: Shape) -> Crew:
    with _lock:
        crew = _crews.get(shape)
        if crew is None or not crew.is_ready():
            if crew is not None:
                crew.end()
            crew = _crews[shape] = Crew(*shape)
        return crew


def _release(shape: Shape) -> None:
    with _lock:
        _pools[shape] -= 1
        crew = _crews.pop(shape, None) if _pools[shape] <= 0 else None
    if crew is not None:
        crew.end()


@atexit.register
def _end_all() -> None:
    while _crews:
        _crews.popitem()[1].end()


def _after_fork() -> None:
    """In a forked child: the crews are the parent's, and a loader worker of a run ends with the parent at once."""
    global _run_lock, _run_thread
    for crew in _crews.values():
        crew.disown()
        _disowned.append(crew)
    _crews.clear()
    if _run_in_main_thread and _run_thread == threading.get_ident():
        signal.set_wakeup_fd(-1)  # a signal to the child is not for the parent's watch
        if sys.platform == "linux":
            # Sent when the forking thread ends; of the main thread it is known that nothing outlives it.
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _run_lock, _run_thread = threading.Lock(), None


PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_disowned: list[Crew] = []
"""The parent's crews, in a forked child: kept, for the end of a `Popen` object complains of a process that lives."""
os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    global _run_thread, _run_in_main_thread
    if _run_thread == threading.get_ident():
        raise LaunchError("a run on several ranks was started from inside of another; wait for the first to return")
    with _run_lock:
        _run_thread = threading.get_ident()
        _run_in_main_thread = threading.current_thread() is threading.main_thread()
        try:
            yield
        finally:
            _run_thread = None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _LoopbackStore:
    """The key-value store at which the ranks of one machine meet. Nothing outside of the machine can reach it."""

    def __enter__(self) -> _LoopbackStore:
        self._store: dist.TCPStore | None = network.open_store(network.LOOPBACK, 0, timedelta(minutes=30))
        self.address = (network.LOOPBACK, self._store.port)
        return self

    def close(self) -> None:
        self._store = None

    def __exit__(self, *error: object) -> None:
        self.close()


def _what_cannot_be_sent(function: Callable[..., Any], args: tuple[Any, ...], error: Exception) -> str:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    names = list(code.co_varnames[: code.co_argcount]) if code is not None else []
    names = names[1 + hasattr(function, "__self__") :]
    names += [f"argument {index}" for index in range(len(names), len(args))]
    found = unsendable.explain(
        {**dict(zip(names, args, strict=False)), getattr(function, "__name__", "function"): function}
    )
    return found or f"the work cannot be sent to the other ranks: {error}"
