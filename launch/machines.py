"""The machines of a run: what they tell one another, and how the loss of one is noticed."""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch.distributed import Store

INTERVAL = 1.0
"""Seconds between two signs of life."""

SECONDS_FOR_THE_CAUSE = 4.0
"""How long a machine whose ranks only lost others waits for one that knows more, all machines being alive."""

SECONDS_TO_LEAVE = 5.0
"""How long the store outlives the run for machines that have not read the last word yet."""


@dataclass(frozen=True)
class Node:
    """A machine, as its launcher presents itself.

    Attributes:
        host: Host name.
        address: Address at which the others reach it.
        pid: Of the launcher.
    """

    host: str
    address: str
    pid: int

    def __str__(self) -> str:
        return f"host {self.host} ({self.address})"


@dataclass(frozen=True)
class Notice:
    """What one machine tells all.

    Attributes:
        kind: "failure" ends the attempt everywhere; "echo" tells of ranks that only lost others, and waits for
            somebody who knows more; "regroup" starts all ranks anew because a machine joins.
        node: Which machine says so.
        headline: What happened, in a line without its colon.
        words: What the failing rank said last, in lines; may be empty.
        status: The exit code that it gives the run.
        timeout: The rank's words, where it waited for another in vain.
        final: Whether a restart is out of the question.
    """

    kind: str
    node: int
    headline: str
    words: str = ""
    status: int = 1
    timeout: str = ""
    final: bool = False

    @property
    def is_consequence(self) -> bool:
        """Whether somebody else's word goes before this one."""
        return self.kind == "echo"

    def describe(self, note: str = "") -> str:
        """The text that the user sees.

        Args:
            note: Goes to the end of the first line.
        """
        return f"{self.headline}{note}{':' if self.words else ''}\n{self.words}"


class Watch:
    """Lets the other machines hear of this one during an attempt, and this one of them.

    A thread writes a sign of life to the common store every second, and looks for the others'. It alone uses the
    store: where the way there is cut a call may never return, and the launcher must not wait with it. The first
    machine looks at all others, which look at the first; what it finds it tells all. The clocks of the machines
    are not compared.

    Args:
        store: This attempt's part of the store. It holds "beat/<n>" of every machine and "notices" already.
        nodes: All machines of the attempt.
        me: Which one this is.
        keeper: The machine whose launcher is the store.
        timeout: Seconds of silence after which a machine is taken for lost.
        line: A connection to the keeper that nothing is said on; it breaks when the keeper ends.
        count_waiting: Number of machines that want to join; called by the thread.
    """

    def __init__(
        self,
        store: Store,
        nodes: Sequence[Node],
        me: int,
        keeper: Node,
        timeout: float,
        line: socket.socket | None = None,
        count_waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._me = me
        self._keeper = keeper
        self._timeout = timeout
        self._line = line
        self._count_waiting = count_waiting
        self._keeps_store = nodes[me] == keeper
        self._watched = range(len(nodes)) if me == 0 or self._keeps_store else range(1)
        self._state = "running"
        self._states = ["running"] * len(nodes)
        self._beats = [b""] * len(nodes)
        self._count = 0
        self._broken = ""
        now = time.monotonic()
        self._heard = [now] * len(nodes)
        self._answered = self._looked = now
        self._notices: list[Notice] = []
        self._first_notice = now
        self._decided: Notice | None = None
        self._outbox: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._rounds = threading.Condition()
        self._ended = False
        threading.Thread(target=self._run, daemon=True, name="lightlite-machines").start()

    def tell(self, notice: Notice) -> None:
        """Tell all machines. Returns at once."""
        self._outbox.put(notice)
        self._wake.set()

    def tell_failure(self, text: str, status: int, *, is_consequence: bool = False, timeout: str = "") -> None:
        """Tell all machines that a rank of this one failed.

        Args:
            text: A line on who failed, and the lines of what it said.
            status: The exit code it gives the run.
            is_consequence: Whether the rank seems only to have lost another.
            timeout: Its words, where it waited for another in vain.
        """
        headline, _, words = text.partition("\n")
        kind = "echo" if is_consequence else "failure"
        self.tell(Notice(kind, self._me, headline.removesuffix(":"), words, status, timeout))

    def verdict(self) -> Notice | None:
        """What ends the attempt, as far as is known now; the same on every machine that can still be reached."""
        self._forgive_standstill()
        known = self._told_verdict()
        if known is None and self._decided is None:
            self._decided = self._find_lost() or self._settle_for_an_echo()
            if self._decided is not None:
                self.tell(self._decided)
        return known or self._decided

    def _told_verdict(self) -> Notice | None:
        return next((notice for notice in self._notices if not notice.is_consequence), None)

    def wait_for_verdict(self, *, is_consequence: bool) -> Notice | None:
        """Wait until it is known what brought a failure of this machine's ranks about.

        Args:
            is_consequence: Whether the ranks seem only to have lost another, so that waiting for long is worth it.

        Returns:
            None if nothing is known after a while.
        """
        patience = self._timeout + SECONDS_FOR_THE_CAUSE + 2 * INTERVAL if is_consequence else 2 * INTERVAL
        deadline = time.monotonic() + patience
        while (found := self.verdict()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def timeout_elsewhere(self, seconds: float) -> str:
        """What a rank elsewhere said that waited for another in vain, so long ago at least; else an empty string."""
        if time.monotonic() < self._first_notice + seconds:
            return ""
        return next((notice.timeout for notice in self._notices if notice.timeout and notice.node != self._me), "")

    @property
    def here(self) -> Node:
        """This machine."""
        return self._nodes[self._me]

    @property
    def is_cut_off(self) -> bool:
        """Whether the store cannot be reached any more."""
        return bool(self._broken) or time.monotonic() - self._answered > self._timeout

    @property
    def is_regrouping(self) -> bool:
        """Whether all ranks are to start anew because a machine joins."""
        known = self._told_verdict()
        return known is not None and known.kind == "regroup"

    def finish(self) -> bool:
        """This machine's ranks have done their work.

        Returns:
            Whether those of all others have, too.
        """
        if self._state == "running":
            self._state = "finished"
            self._wake.set()
        return "done" in (self._state, self._states[0]) or self._states[0] == "left"

    def leave(self, *, for_good: bool = True) -> None:
        """Take leave of the attempt.

        Args:
            for_good: Whether this process ends next; if it keeps the store it waits for the others, but not for long.
        """
        if self._ended:
            return
        self._state = "left"
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        if not self.is_cut_off:
            self._wait_for_rounds(2, min(deadline, time.monotonic() + 2 * INTERVAL))
        while for_good and self._keeps_store and not self._all_left() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._ended = True
        self._wake.set()

    def _all_left(self) -> bool:
        silent = [time.monotonic() - heard > self._timeout for heard in self._heard]
        others = (node for node in range(len(self._nodes)) if node != self._me)
        return all(self._states[node] == "left" or silent[node] for node in others)

    def _wait_for_rounds(self, number: int, deadline: float) -> None:
        """Wait for that many more exchanges with the store, the one under way included."""
        with self._rounds:
            wanted = self._count + number
            while self._count < wanted and not self._broken and (left := deadline - time.monotonic()) > 0:
                self._wake.set()
                self._rounds.wait(left)

    def _forgive_standstill(self) -> None:
        """Where this process itself stood still, the others are not to blame for not having been heard."""
        now = time.monotonic()
        gap, self._looked = now - max(self._looked, self._answered), now
        if gap > 2 * INTERVAL:
            self._answered = min(now, self._answered + gap)
            self._heard = [min(now, heard + gap) for heard in self._heard]

    def _find_lost(self) -> Notice | None:
        now = time.monotonic()
        keeper = f"{self._keeper}, where the machines meet,"
        silence = f"has not been heard of for {self._timeout:g} s (--node-timeout)"
        if self._broken:
            return Notice("failure", self._me, f"{keeper} has gone: {self._broken}", final=True)
        silent = [self._keeper] if now - self._answered > self._timeout else []
        for node in self._watched:
            alive = node == self._me or self._states[node] == "left"
            if not alive and now - self._heard[node] > self._timeout:
                silent.append(self._nodes[node])
        if self._keeper in silent:
            return Notice("failure", self._me, f"{keeper} {silence}", final=True)
        return Notice("failure", self._me, f"{silent[0]} {silence}") if silent else None

    def _settle_for_an_echo(self) -> Notice | None:
        """On the first machine: what only lost others has to do for a cause, if all machines live and none knows."""
        waited = time.monotonic() - self._first_notice
        if self._me != 0 or not self._notices or waited < SECONDS_FOR_THE_CAUSE:
            return None
        heard = (self._heard[node] for node in self._watched if self._states[node] != "left" and node != self._me)
        if any(time_heard < self._first_notice + INTERVAL for time_heard in heard):
            return None
        return replace(self._notices[0], kind="failure")

    def _run(self) -> None:
        try:
            while not self._ended:
                self._wake.clear()
                self._check_line()
                self._exchange()
                with self._rounds:
                    self._count += 1
                    self._rounds.notify_all()
                self._wake.wait(INTERVAL)
        except Exception as error:  # torch raises RuntimeErrors of many kinds, and elastic its own
            self._broken = (str(error).splitlines() or [type(error).__name__])[0]
            with self._rounds:
                self._rounds.notify_all()

    def _check_line(self) -> None:
        """Find out that the keeper has ended; torch would tell it on standard error, at length, when asked."""
        if self._line is not None and select.select([self._line], [], [], 0)[0]:
            raise ConnectionResetError("its launcher has ended")

    def _exchange(self) -> None:
        self._send_beat()
        while not self._outbox.empty():
            line = json.dumps(asdict(self._outbox.get())) + "\n"
            self._store.append("notices", line)  # type: ignore[attr-defined]
        beats = self._store.multi_get([f"beat/{node}" for node in self._watched])
        lines = self._store.get("notices").decode().splitlines()
        now = time.monotonic()
        for node, beat in zip(self._watched, beats, strict=True):
            if beat != self._beats[node]:
                self._beats[node], self._heard[node] = beat, now
                self._states[node] = beat.decode().split()[1]
        if lines and not self._notices:
            self._first_notice = now
        self._notices += [Notice(**json.loads(line)) for line in lines[len(self._notices) :]]
        self._answered = now
        if self._me == 0:
            self._lead()

    def _send_beat(self) -> None:
        self._store.set(f"beat/{self._me}", f"{self._count} {self._state}")

    def _lead(self) -> None:
        """What the first machine decides for all."""
        others = self._states[1:]
        if self._state == "finished" and all(state in ("finished", "left") for state in others):
            self._state = "done"
            self._send_beat()
        if all(state == "running" for state in (self._state, *others)) and not self._notices and self._count_waiting():
            self.tell(Notice("regroup", self._me, "another machine joins"))
