"""Where several machines meet: they find each other, agree on what they run, and are numbered."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

from lightlite.errors import MisconfigurationException
from lightlite.launch.machines import Node, Watch
from lightlite.launch.network import is_here, split_endpoint
from lightlite.launch.rendezvous import open_store

MEETING_BACKENDS = ("static", "c10d")
"""Elastic's names of what `Meeting` does instead."""

FIRST_WORD, NEXT_WORD = 5.0, 30.0
"""Seconds after which it is told what is being waited for, and told again."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Terms:
    """What every machine of a run must have been started with.

    Attributes:
        nnodes: "MIN:MAX" machines, or their number.
        ranks: Devices, and so ranks, on each machine.
        max_restarts: How often a failed run is started anew.
        numbered: Whether the machines are numbered by `--node-rank`, and not by elastic.
    """

    nnodes: str
    ranks: int
    max_restarts: int
    numbered: bool

    def difference(self, other: Terms) -> str:
        """What this one has and `other` has not, as "expected …, got …"; empty if they agree."""
        pairs = zip(self._words(), other._words(), strict=True)
        return "; ".join(f"expected {here}, got {there}" for here, there in pairs if here != there)

    def _words(self) -> tuple[str, ...]:
        return (
            f"--nnodes {self.nnodes}",
            f"{self.ranks} device{'s' if self.ranks != 1 else ''} per machine",
            f"--max-restarts {self.max_restarts}",
            "machines numbered by --node-rank" if self.numbered else "machines without --node-rank",
        )


class Meeting(RendezvousHandler):
    """The rendezvous of several machines.

    One launcher keeps a store, where the others find it. The machines are numbered by their node rank, or by
    elastic's dynamic rendezvous ("c10d"), which lets them come and go. Every attempt gets a store of its own for the
    ranks, on the first machine. Whatever may block does so in a thread, so that signals and deadlines hold.

    Args:
        endpoint: "host:port" of the store.
        run_id: Name of the run.
        terms: What this machine was started with.
        node_rank: This machine's number; None lets elastic number.
        keeps_store: Whether the store is in this process; None finds out by the endpoint's address.
        address: This machine's, as the others reach it; None listens on all, and gives the host's name.
        join_timeout: Seconds to wait for the other machines.
        node_timeout: Seconds of silence after which a machine is taken for lost.

    Attributes:
        watch: On the machines of the current attempt; None before the first.
    """

    def __init__(
        self,
        endpoint: str,
        run_id: str,
        terms: Terms,
        *,
        node_rank: int | None,
        keeps_store: bool | None,
        address: str | None,
        join_timeout: float,
        node_timeout: float,
    ) -> None:
        self._endpoint = endpoint
        self._run_id = run_id
        self._terms = terms
        self._node_rank = node_rank
        self._keeps_store = keeps_store
        self._address = address
        self._join_timeout = join_timeout
        self._node_timeout = node_timeout
        fewest, _, most = terms.nnodes.partition(":")
        self._fewest, self._most = int(fewest), int(most or fewest)
        self._node = Node(socket.gethostname(), address or socket.gethostname(), os.getpid())
        self._keeper = self._node
        self._obstacle = ""
        self._arrived = 0
        self._store: TCPStore | None = None
        self._common: Store | None = None
        self._elastic: DynamicRendezvousHandler | None = None
        self._ranks_store: TCPStore | None = None
        self._closed = False
        self._opened = False
        self._line: socket.socket | None = None
        self.watch: Watch | None = None

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks are clients of a launcher's store and listen on nothing for it."""
        return True

    def get_backend(self) -> str:
        """Elastic's name for the way of numbering."""
        return "c10d" if self._node_rank is None else "static"

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the machines of the next attempt.

        Raises:
            MisconfigurationException: Where the machines were not started with the same terms.
            RendezvousError: Where not enough of them come in time, or the store cannot be reached.
        """
        if self.watch is not None:
            self.watch.leave(for_good=False)
            self.watch = None
        started = time.monotonic()
        deadline = started + self._join_timeout
        next_word = started + FIRST_WORD

        def say() -> None:
            nonlocal next_word
            now = time.monotonic()
            if now > next_word:
                next_word = now + NEXT_WORD
                elapsed = f"{now - started:.0f} s of {self._join_timeout:g}"
                sys.stderr.write(f"lightlite.launch: {self._waited_for()} ({elapsed})\n")

        try:
            return in_time(lambda: self._meet(deadline), self._join_timeout + 10, say)
        except (TimeoutError, RendezvousTimeoutError):
            late = f"after {self._join_timeout:g} s (--join-timeout) still {self._waited_for()}"
            raise RendezvousTimeoutError(late) from None

    def is_closed(self) -> bool:
        """Whether the run has ended, as far as this machine knows."""
        return self._closed

    def set_closed(self) -> None:
        """Mark the run as ended."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """1 while all ranks are to be started anew because a machine joins, else 0. Never blocks."""
        return int(self.watch is not None and self.watch.is_regrouping)

    def get_run_id(self) -> str:
        """Name of the run."""
        return self._run_id

    def leave(self) -> None:
        """Leave the attempt; the run goes on, if it can without this machine."""
        if self.watch is not None:
            self.watch.leave()

    def shutdown(self) -> bool:
        """End the run for all machines, and leave."""
        reachable = self.watch is not None and not self.watch.is_cut_off
        if not self._closed and self._elastic is not None and reachable:
            with contextlib.suppress(TimeoutError, RendezvousError):
                in_time(self._elastic.shutdown, 3)
        self._closed = True
        self.leave()
        return True

    def _waited_for(self) -> str:
        """What a waiting user is told."""
        if self._obstacle:
            return f"waiting for {self._endpoint}: {self._obstacle}"
        if self._elastic is not None:
            state = self._elastic._state_holder.state
            self._arrived = len(state.participants) or self._arrived
            if state.complete and self._arrived >= self._most:
                return f"the run at {self._endpoint} has its {self._most} machines; this one stands by"
            if state.complete:
                return f"waiting to be taken into the run at {self._endpoint}"
            if self._arrived >= self._fewest:
                come = f"{self._arrived} of at most {self._most} machines have come to {self._endpoint}"
                return f"{come}; waiting a moment for more"
        missing = self._fewest - self._arrived
        return f"waiting for {missing} of {self._fewest} machines at {self._endpoint}"

    def _meet(self, deadline: float) -> RendezvousInfo:
        if self._store is None:
            self._store = self._open_or_connect(deadline)
        self._common = PrefixStore(f"lightlite/{self._run_id}", self._store)
        self._agree(self._common)
        if self._node_rank is None:
            rank, world_size, store = self._be_numbered(self._store)
        else:
            rank, world_size, store = self._take_place(self._common, self._node_rank, deadline)
        return self._form(store, rank, world_size)

    def _open_or_connect(self, deadline: float) -> TCPStore:
        host, port = split_endpoint(self._endpoint)
        keeps = is_here(host) if self._keeps_store is None else self._keeps_store
        timeout = timedelta(seconds=self._join_timeout)
        if keeps:
            try:
                store = open_store("", port, timeout)
                self._opened = True
                return store
            except RendezvousConnectionError as error:
                taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
                if self._keeps_store or not taken:
                    raise
        while True:
            try:
                self._line = socket.create_connection((host, port), timeout=5)
                self._obstacle = ""
                return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            except OSError as error:
                self._obstacle = str(error)
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError
            time.sleep(0.5)

    def _agree(self, common: Store) -> None:
        """Have all machines run the same; whoever comes first says what.

        Raises:
            MisconfigurationException: On the machine that differs.
        """
        if self._opened:
            common.set("keeper", json.dumps(asdict(self._node)))
        mine = json.dumps({"node": asdict(self._node), "terms": asdict(self._terms)})
        first = json.loads(common.compare_set("terms", "", mine))
        self._keeper = Node(**json.loads(common.get("keeper")))
        difference = Terms(**first["terms"]).difference(self._terms)
        if difference:
            start = f"{self._node} does not fit the run that {Node(**first['node'])} has started at {self._endpoint}"
            self._refuse(common, f"{start}: {difference}")

    def _refuse(self, common: Store, reason: str) -> None:
        """End this machine, and all that wait with it for a run that has not started yet."""
        if not common.check(["formed"]):
            common.set("refused", reason)
            self._let_others_read()
        raise MisconfigurationException(reason)

    def _raise_if_refused(self, common: Store) -> None:
        if common.check(["refused"]) and not common.check(["formed"]):
            reason = common.get("refused").decode()
            self._let_others_read()
            raise MisconfigurationException(reason)

    def _let_others_read(self) -> None:
        if self._node == self._keeper:
            time.sleep(3)

    def _take_place(self, common: Store, rank: int, deadline: float) -> tuple[int, int, Store]:
        """Take the place with this number, and wait until the others are taken."""
        mine = json.dumps(asdict(self._node))
        taken = common.compare_set(f"place/{rank}", "", mine).decode()
        if taken != mine:
            other = Node(**json.loads(taken))
            self._refuse(common, f"{self._node} was started with --node-rank {rank}, and so was {other}")
        while True:
            self._raise_if_refused(common)
            self._arrived = sum(common.check([f"place/{number}"]) for number in range(self._most))
            if self._arrived == self._most:
                return rank, self._most, common
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError
            time.sleep(0.2)

    def _be_numbered(self, store: TCPStore) -> tuple[int, int, Store]:
        """Be numbered by elastic, and wait until there are enough machines."""
        if self._elastic is None:
            self._elastic = self._elastic_handler(store)
        try:
            found = self._elastic.next_rendezvous()
        except RendezvousClosedError as error:
            raise RendezvousClosedError(f"the run {self._run_id!r} at {self._endpoint} has ended") from error
        return found.rank, found.world_size, found.store

    def _elastic_handler(self, store: TCPStore) -> DynamicRendezvousHandler:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # elastic's store for ranks outlives their attempt
        meeting = self

        class Backend(C10dRendezvousBackend):
            def get_state(self) -> Any:
                assert meeting._common is not None
                if meeting.watch is not None and meeting.watch.is_cut_off:
                    raise RendezvousConnectionError("the store cannot be reached")
                try:
                    meeting._raise_if_refused(meeting._common)
                except DistError as error:
                    raise RendezvousConnectionError("the store cannot be reached") from error
                return super().get_state()

        # A machine that is lost has to be so in elastic's eyes, too, when the others come together again.
        interval = max(1, int(self._node_timeout / 6))
        parameters = RendezvousParameters(
            "c10d",
            self._endpoint,
            self._run_id,
            self._fewest,
            self._most,
            self._address,
            join_timeout=int(self._join_timeout),
            last_call_timeout=max(1, int(min(30, self._node_timeout))),
            keep_alive_interval=interval,
            keep_alive_max_attempt=max(2, int(self._node_timeout / interval)),
        )
        return create_handler(store, Backend(store, self._run_id), parameters)

    def _form(self, store: Store, rank: int, world_size: int) -> RendezvousInfo:
        """Open the ranks' store on the first machine, get to know all machines, and watch them from now on."""
        assert self._common is not None
        if rank == 0:
            self._ranks_store = open_store(self._address or "", 0, timedelta(minutes=5))
            store.set("notices", "")
            store.set("store", json.dumps([self._node.address, self._ranks_store.port]))
            self._common.set("formed", "")
        store.set(f"beat/{rank}", "0 running")
        store.set(f"node/{rank}", json.dumps(asdict(self._node)))
        address, port = json.loads(store.get("store"))
        nodes = [Node(**json.loads(told)) for told in store.multi_get([f"node/{i}" for i in range(world_size)])]
        count_waiting = self._elastic.num_nodes_waiting if self._elastic is not None else lambda: 0
        self.watch = Watch(store, nodes, rank, self._keeper, self._node_timeout, self._line, count_waiting)
        return RendezvousInfo(store, rank, world_size, RendezvousStoreInfo(address, port))


def in_time(call: Callable[[], Result], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Result:
    """The result of a call that may block for ever, and then is left to itself in a thread.

    Args:
        call: What to call.
        seconds: How long it may take.
        meanwhile: Called ten times a second.

    Raises:
        TimeoutError: Where it takes longer.
    """
    outcome: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True, name="lightlite-meeting").start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            result, error = outcome.get(timeout=0.1)
            if error is not None:
                raise error
            return result  # type: ignore[return-value]
        meanwhile()
    raise TimeoutError
