"""A run that is told to end saves where it is, on all ranks at the same step, and ends with exit code 143.

SIGTERM is how schedulers, clusters and clouds tell; SIGUSR1 is what Slurm sends ahead of it where it was asked to
(`--signal=USR1@90`). The handler does nothing but note the signal. It may reach one rank, or all of them at different
steps, so the ranks agree on one, without a collective call per batch: every rank has a thread that looks into the
group's store twice a second. One that learns of the signal notes how many batches its rank has begun, and waits for the
others' numbers; one more than the highest of them is where all leave. Between batches a rank that knows of the signal
waits for that number before it begins another, so none can get past it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lightlite import distributed
from lightlite.errors import SIGTERMException
from lightlite.registry import EnvironmentRegistry
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.trainer import Trainer

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
LOOK_EVERY = 0.5
"""Seconds between two looks into the store."""

PATIENCE = 60.0
"""Seconds that a rank waits for the others' numbers; one that does not answer has failed, or hangs."""


class Preemption:
    """Notes signals that tell a fit to end, and has all ranks leave at the same step.

    A signal for which the script has a handler of its own is left to it.

    Args:
        trainer: The trainer.

    Attributes:
        asked: Whether this rank knows that the run is to end.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._progress = trainer, trainer.progress
        self.asked = False
        self._received: int | None = None  # by this process
        self._signal: int | None = None  # by any
        self._leave_at = 0.0
        self._agreed = threading.Event()
        self._over = threading.Event()
        self._wake = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals are noted. One that came too late to be heeded takes its usual effect afterwards."""
        former = self._install()
        alone = distributed.world_size() == 1
        agent = None if alone else threading.Thread(target=self._agree, name="lightlite-preemption", daemon=True)
        if agent is not None:
            agent.start()
        heeded = False
        try:
            with _announced(bool(former)):
                yield
        except SIGTERMException:
            heeded = True
            raise
        finally:
            self._over.set()
            self._wake.set()
            if agent is not None:
                agent.join(0.2)  # it may be waiting for a store that answers no more
            for number, handler in former.items():
                signal.signal(number, handler)
            if self._received is not None and not heeded:
                signal.raise_signal(self._received)

    def _install(self) -> dict[int, signal.Handlers]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        former = {number: signal.SIG_DFL for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL}
        for number in former:
            signal.signal(number, self._note)
        return former

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._agreed.is_set() and self._leave_at == math.inf:  # nobody is left to agree with
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = self._received = number
        self._trainer.received_sigterm = True
        if distributed.world_size() == 1:
            self.asked = True
        self._wake.set()

    # In the thread.

    def _agree(self) -> None:
        try:
            self._leave_at = self._agreed_place()
        except Exception:  # the store is gone, and with it another rank: that is told elsewhere
            self._leave_at = math.inf
        finally:
            self._agreed.set()

    def _agreed_place(self) -> float:
        store = distributed.store("preemption")
        while self._signal is None and not store.check(["signal"]):
            self._wake.wait(LOOK_EVERY)
            if self._over.is_set() and self._signal is None:
                return math.inf
        if self._signal is not None:
            store.set("signal", str(int(self._signal)))
        self._signal = int(store.get("signal"))
        self._trainer.received_sigterm = True
        # In this order: the rank looks at the one after it has added to the other.
        self.asked = True
        begun = self._progress.batches_total
        store.set(f"begun by {distributed.rank()}", str(begun))
        names = [f"begun by {rank}" for rank in range(distributed.world_size())]
        while not store.check(names):
            if self._over.wait(0.01):
                return math.inf
        return 1 + max(int(store.get(name)) for name in names)

    # In the loop.

    def leave_if_agreed(self) -> None:
        """Between two batches, on a rank that was asked: save and leave, if this is where all do.

        Raises:
            SIGTERMException: On every rank.
        """
        if distributed.world_size() > 1 and not self._agreed.wait(PATIENCE):
            self._leave_at = math.inf
        if self._progress.batches_total >= self._leave_at:
            self.leave()

    def leave(self) -> None:
        """Save, and leave. A collective call.

        Raises:
            SIGTERMException: Always.
        """
        trainer = self._trainer
        number = next((number for number in distributed.gather_objects(self._signal) if number), signal.SIGTERM)
        self._received = None
        path = trainer.save_preempted()
        name = signal.Signals(number).name
        rank_zero_info(
            f"Trainer.fit was told to end by {name}: saved {path} at step {trainer.global_step}; "
            "fit(ckpt_path='last') goes on from there"
        )
        if name == "SIGUSR1" and trainer.is_global_zero:
            for environment in EnvironmentRegistry.loadable().values():
                if why := environment.requeue():
                    rank_zero_warn(why)
        trainer.strategy.barrier("preempted")
        raise SIGTERMException


@contextlib.contextmanager
def _announced(listening: bool) -> Iterator[None]:
    """Let a launcher know, by a file beside its error file, that this process answers SIGTERM by saving."""
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if not listening or not error_file.name or not error_file.parent.is_dir():
        yield
        return
    sign = error_file.with_name("saves")
    sign.touch()
    try:
        yield
    finally:
        sign.unlink(missing_ok=True)
