"""Runs the ranks of this machine, on torch.distributed.elastic, and ends them well."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lightlite.errors import MisconfigurationException
from lightlite.launch import echoes, hanging, stacks
from lightlite.launch import guard as guarding
from lightlite.launch.ending import SIGNALS, Guard, passed_on, second_interrupt, signals_raise
from lightlite.launch.failure import Failure, deadlock, first_cause, memory_kills, read_failure
from lightlite.launch.logs import RankLogs
from lightlite.launch.meeting import MEETING_BACKENDS, Meeting, Terms
from lightlite.launch.network import LOOPBACK
from lightlite.launch.rendezvous import register_loopback

ENTRY = Path(__file__).with_name("entry.py")
MONITOR_INTERVAL = 0.1
PATIENCE = 1.0
"""Seconds for the cause of a failure to show, counted anew while failing ranks are on their way out, …"""
MOST_PATIENCE = 1.5
"""… but in all no more than these."""


SAVING = 120.0
"""Seconds that ranks get to save, which have said that they will, where the launcher is told to end by SIGTERM."""


@dataclass(frozen=True)
class Launch:
    """What the agent is to run.

    Attributes:
        command: Program and arguments of each rank.
        local_world_size: Ranks on this machine.
        min_nodes: Fewest machines to run on.
        max_nodes: Most machines to run on.
        backend: Name of elastic's rendezvous backend.
        endpoint: "host:port" of the rendezvous; empty on a single machine.
        run_id: Name of the run, the same on every machine.
        options: More for the rendezvous backend.
        local_addr: This machine's address as others reach it; None lets elastic look it up.
        node_rank: This machine's number, where the machines are numbered; None lets elastic number them.
        join_timeout: Seconds to wait for the other machines.
        node_timeout: Seconds of silence after which another machine is taken for lost.
        max_restarts: How often a failed run is started anew.
        log_dir: Where the ranks' output goes; None for a temporary folder.
        output: "first" shows rank 0's output, "tee" everybody's, "quiet" nobody's.
        grace: Seconds from SIGTERM to SIGKILL.
    """

    command: tuple[str, ...]
    local_world_size: int
    min_nodes: int
    max_nodes: int
    backend: str
    endpoint: str
    run_id: str
    options: dict[str, Any] = field(default_factory=dict)
    local_addr: str | None = None
    node_rank: int | None = None
    join_timeout: float = 600.0
    node_timeout: float = 30.0
    max_restarts: int = 0
    log_dir: str | None = None
    output: str = "first"
    grace: float = 3.0


class Cause(Protocol):
    """What ended an attempt."""

    @property
    def status(self) -> int:
        """The exit code that it gives the run."""

    def describe(self, note: str = "") -> str:
        """The text that the user sees, with a note at the end of its first line."""


class RankAgent(LocalElasticAgent):
    """Elastic's agent of one machine, with lightlite's way of ending ranks.

    It differs in three things: a signal goes to the ranks and not to their data-loader workers, which a rank
    ends itself; whatever is left of what a rank started after `grace` seconds is killed; and it knows which
    rank failed first, or hangs.

    Args:
        spec: What to run.
        logs: Where output goes.
        guard: Ends the ranks if this process is killed.
        grace: Seconds from the signal to SIGKILL.

    Attributes:
        failure: The cause of the last failed attempt.
    """

    def __init__(self, spec: WorkerSpec, logs: RankLogs, guard: Guard, grace: float) -> None:
        super().__init__(spec, logs_specs=logs, log_line_prefix_template="[rank ${rank}] ")
        self._guard = guard
        self._grace = grace
        self._last_poll = time.time()
        self._memory_kills = memory_kills()
        self.failure: Cause | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._guard.watch(self._guard.mark)
        ids: dict[int, Any] = super()._start_workers(worker_group)
        self._guard.watch(*ids.values())
        self._last_poll = time.time()
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        failures = self._failures(worker_group)
        if not failures:
            self._last_poll, self._memory_kills = time.time(), memory_kills()
            if any(process.poll() != 0 for process in self._processes().values()):
                return RunResult(WorkerState.HEALTHY)  # one that fails meanwhile is found the next time
            finished: RunResult = super()._monitor_workers(worker_group)
            return finished
        failures = self._with_cause(worker_group, failures)
        hanging_rank = self._hanging(worker_group, failures)
        leaving = {failure.pid for failure in failures}
        self._end_ranks(signal.SIGTERM, leaving, hanging_rank.pid if hanging_rank is not None else None)
        result: RunResult = super()._monitor_workers(worker_group)
        return self._settle(result, hanging_rank or self._with_remark(worker_group, failures))

    def _settle(self, result: RunResult, cause: Cause) -> RunResult:
        """Keep the cause of a failed attempt, and tell it if there is to be another one."""
        self.failure = cause
        left = self._remaining_restarts
        if left:
            report(cause, self._logs_specs.root_log_dir, f"; starting all ranks anew (restarts left: {left - 1})")
        return result

    def _failures(self, worker_group: WorkerGroup) -> list[Failure]:
        found = []
        assert isinstance(self._pcontext, SubprocessContext)
        for local_rank, process in self._processes().items():
            stderr = self._pcontext.stderrs[local_rank]
            failure = read_failure(
                rank=worker_group.workers[local_rank].global_rank,
                pid=process.pid,
                exitcode=process.poll(),
                seen=self._last_poll,
                error_file=self._pcontext.error_files[local_rank],
                stderr=Path(stderr) if stderr else None,
            )
            if failure is not None:
                found.append(failure)
        return found

    def _with_cause(self, worker_group: WorkerGroup, failures: list[Failure]) -> list[Failure]:
        """Wait a moment where all that failed only missed another rank: that one may still be on its way out."""
        start = last = time.monotonic()
        while (
            all(failure.is_consequence for failure in failures)
            and self._running(failures)
            and time.monotonic() < min(last + PATIENCE, start + MOST_PATIENCE)
        ):
            time.sleep(MONITOR_INTERVAL / 2)
            seen, failures = len(failures), self._failures(worker_group)
            pids = {failure.pid for failure in failures}
            leaving = any(process.pid in pids and process.poll() is None for process in self._processes().values())
            if len(failures) > seen or leaving:
                last = time.monotonic()
        return failures

    def _running(self, failures: list[Failure]) -> dict[int, int]:
        """Process id, by local rank, of ranks that have neither failed nor ended."""
        failed = {failure.pid for failure in failures}
        processes = self._processes().items()
        return {
            rank: process.pid for rank, process in processes if process.pid not in failed and process.poll() is None
        }

    def _hanging(self, worker_group: WorkerGroup, failures: list[Failure]) -> Failure | None:
        """The rank that the others waited for in vain, if that is how they failed."""
        running = self._running(failures)
        timeouts = [failure.timeout for failure in failures if failure.timeout]
        if not running or not timeouts or not all(failure.is_consequence for failure in failures):
            return None
        return self._waited_for(worker_group, running, timeouts[0])

    def _waited_for(self, worker_group: WorkerGroup, running: dict[int, int], timeout: str) -> Failure:
        """The one among running ranks that kept others waiting.

        Args:
            worker_group: All ranks of this machine.
            running: Process id by local rank; at least one.
            timeout: What one of the others said.
        """
        assert self._pcontext is not None
        files = self._pcontext.error_files
        found = hanging.find(
            {
                pid: functools.partial(stacks.ask_file, pid, Path(files[rank]).with_name("stack.txt"), str(ENTRY))
                for rank, pid in running.items()
            }
        )
        local_rank = next(rank for rank, pid in running.items() if pid == found.pid)
        return Failure(
            rank=worker_group.workers[local_rank].global_rank,
            pid=found.pid,
            exitcode=1,
            time=time.time(),
            traceback=found.stack,
            how=f"kept the other ranks waiting{echoes.how_long(timeout)}; {found.how}",
        )

    def _with_remark(self, worker_group: WorkerGroup, failures: list[Failure]) -> Failure:
        """The failure that brought the others about, with what is known of its cause besides."""
        failure = deadlock(failures) or first_cause(failures)
        remark = ""
        if failure.exitcode == -signal.SIGKILL:
            before, now = self._memory_kills, memory_kills()
            if before is None or now is None:
                remark = "; the kernel does that when memory runs out"
            elif now > before:
                remark = "; memory ran out, and the kernel's out-of-memory killer was at work"
        elif failure.is_consequence:
            ended = [local for local, process in self._processes().items() if process.poll() == 0]
            ranks = [worker_group.workers[local].global_rank for local in ended]
            remark = f"; rank {ranks[0]} had ended before, with exit code 0" if ranks else ""
        return replace(failure, remark=remark)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        processes = self._processes()
        if not processes or any(process.poll() != 0 for process in processes.values()):
            told_to_end = isinstance(sys.exc_info()[1], SignalException) and death_sig == signal.SIGTERM
            self._end_ranks(death_sig, patience=SAVING if told_to_end else 0.0)
        self._guard.forget(self._guard.mark, *(process.pid for process in processes.values()))
        for file in self._pcontext.error_files.values() if self._pcontext is not None else ():
            for sign in ("stack.txt", "saves"):
                Path(file).with_name(sign).unlink(missing_ok=True)
        super()._shutdown(death_sig, timeout)

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        return {local_rank: handler.proc for local_rank, handler in self._pcontext.subprocess_handlers.items()}

    def _saves(self, local_rank: int) -> bool:
        """Whether a rank has said that it answers SIGTERM by saving."""
        return self._pcontext is not None and Path(self._pcontext.error_files[local_rank]).with_name("saves").exists()

    def pass_on(self, number: int) -> None:
        """Send a signal to the ranks."""
        for process in self._processes().values():
            process.send_signal(number)

    def _end_ranks(
        self,
        death_sig: signal.Signals,
        spare: Iterable[int] = (),
        hanging_rank: int | None = None,
        patience: float = 0.0,
    ) -> None:
        """Signal the ranks, wait until they have ended, kill whatever is left of what they started.

        Args:
            death_sig: What the ranks get first.
            spare: Pids of ranks that are ending by themselves and only have to be waited for.
            hanging_rank: Pid of the one that would not heed the signal.
            patience: Seconds that ranks get which have said that they answer the signal by saving.
        """
        processes = self._processes().values()
        with second_interrupt() as hurry:
            for process in processes:
                if process.pid == hanging_rank:
                    process.kill()
                elif process.pid not in spare:
                    process.send_signal(death_sig)
            began = time.monotonic()
            while running := self._running([]):
                waited = time.monotonic() - began
                if waited > self._grace and (waited > patience or not any(map(self._saves, running))):
                    break
                if hurry.wait(0.02):
                    break
            guarding.end((process.pid for process in processes), [self._guard.mark])
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)  # one that hangs in the kernel cannot be waited for


def report(failure: Cause, log_dir: str | None, note: str = "") -> None:
    """Tell on standard error which rank failed. The rank's own words come last."""
    sys.stdout.flush()
    start = "\n" if sys.stderr.isatty() else ""
    logs = f"The output of all ranks is in {log_dir}\n" if log_dir else ""
    sys.stderr.write(f"{start}{logs}{failure.describe(note)}")
    sys.stderr.flush()


def run(launch: Launch, kind: type[RankAgent] = RankAgent) -> int:
    """Run the ranks of this machine until they end.

    Args:
        launch: What to run.
        kind: The agent: another one where several machines are watched.

    Returns:
        0, or the exit code of the rank that failed first; 128 + the signal's number for a signal, be it the
        rank's or this process's; 2 where the machines were not started alike.
    """
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)  # elastic's own account of a failure would drown the rank's
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in SIGNALS)
    os.environ["LIGHTLITE_LAUNCHER_PID"] = str(os.getpid())
    with signals_raise() as ignore_signals, contextlib.ExitStack() as stack:
        try:
            return _run(launch, kind, stack)
        except SignalException as received:
            return 128 + received.sigval
        except MisconfigurationException as error:
            sys.stderr.write(f"lightlite.launch: error: {error}\n")
            return 2
        except (RendezvousError, DistError) as error:
            where = launch.endpoint or LOOPBACK
            sys.stderr.write(f"lightlite.launch: the ranks could not meet at {where}: {_chain(error)}\n")
            return 1
        except OSError as error:
            sys.stderr.write(f"lightlite.launch: the ranks could not be started: {_chain(error)}\n")
            return 1
        finally:
            ignore_signals()


def _run(launch: Launch, kind: type[RankAgent], stack: contextlib.ExitStack) -> int:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lightlite-", ignore_cleanup_errors=True))
    os.environ["LIGHTLITE_SCRATCH"] = folder
    guard = Guard()
    stack.callback(guard.close)
    guard.watch(folder)
    os.environ.update(guard.variables)
    stack.callback(lambda: [os.environ.pop(name) for name in guard.variables])
    handler = _rendezvous(launch)
    agent = kind(_spec(launch, handler), RankLogs(launch.log_dir or folder, launch.output), guard, launch.grace)
    with passed_on(signal.SIGUSR1, agent.pass_on):
        result = agent.run()
    handler.shutdown()
    if result is None or not result.is_failed():
        return 0
    assert agent.failure is not None
    report(agent.failure, launch.log_dir)
    return agent.failure.status


def _rendezvous(launch: Launch) -> RendezvousHandler:
    register_loopback()
    if launch.backend in MEETING_BACKENDS:
        fewest, most = launch.min_nodes, launch.max_nodes
        nnodes = str(most) if fewest == most else f"{fewest}:{most}"
        return Meeting(
            launch.endpoint,
            launch.run_id,
            Terms(nnodes, launch.local_world_size, launch.max_restarts, launch.node_rank is not None),
            node_rank=launch.node_rank,
            keeps_store=launch.options.get("is_host"),
            address=launch.local_addr,
            join_timeout=launch.join_timeout,
            node_timeout=launch.node_timeout,
        )
    parameters = RendezvousParameters(
        backend=launch.backend,
        endpoint=launch.endpoint,
        run_id=launch.run_id,
        min_nodes=launch.min_nodes,
        max_nodes=launch.max_nodes,
        local_addr=launch.local_addr,
        **launch.options,
    )
    return get_rendezvous_handler(parameters)


def _spec(launch: Launch, handler: RendezvousHandler) -> WorkerSpec:
    program, *arguments = launch.command
    return WorkerSpec(
        role="rank",
        local_world_size=launch.local_world_size,
        entrypoint=program,
        args=tuple(argument.replace("$", "$$") for argument in arguments),  # elastic substitutes ${local_rank}
        rdzv_handler=handler,
        max_restarts=launch.max_restarts,
        monitor_interval=MONITOR_INTERVAL,
        local_addr=launch.local_addr,
    )


def _chain(error: BaseException | None) -> str:
    """An error and what caused it, as one line."""
    parts = []
    while error is not None:
        parts.append(f"{type(error).__name__}: {error}".splitlines()[0])
        error = error.__cause__
    return " <- ".join(parts)
