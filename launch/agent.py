"""Runs the ranks of this machine, on torch.distributed.elastic, and ends them well."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lightlite.launch.failure import Failure, first_cause, read_failure
from lightlite.launch.rendezvous import LOOPBACK, register_loopback

GUARD = Path(__file__).with_name("guard.py")
MONITOR_INTERVAL = 0.1
SECONDS_FOR_THE_CAUSE = 1.0
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


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
    max_restarts: int = 0
    log_dir: str | None = None
    output: str = "first"
    grace: float = 3.0


class Guard:
    """The process that ends the ranks if this one is killed.

    Args:
        folder: Temporary folder that is to go, too; None if there is none.
    """

    def __init__(self, folder: str | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), *([folder] if folder else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, groups: Iterable[int]) -> None:
        """Kill these process groups if this process dies."""
        self._tell("+", groups)

    def forget(self, groups: Iterable[int]) -> None:
        """These process groups have ended."""
        self._tell("-", groups)

    def _tell(self, sign: str, groups: Iterable[int]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody ended the guard; the run need not end with it
            self._process.stdin.write("".join(f"{sign}{group}\n" for group in groups).encode())
            self._process.stdin.flush()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class RankLogs(LogsSpecs):
    """Where the ranks' output goes: `<folder>/attempt_<n>/rank_<r>/stdout.log`, `stderr.log` and `error.json`.

    Args:
        folder: The root.
        output: As in `Launch`.
    """

    def __init__(self, folder: str, output: str) -> None:
        super().__init__(log_dir=folder)
        self._output = output

    @property
    def root_log_dir(self) -> str:
        """The root folder."""
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of one attempt; each rank learns of its own through `envs`."""
        destination = LogsDest()
        for local_rank, env in envs.items():
            folder = Path(self.root_log_dir, f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", f"rank_{env['RANK']}")
            folder.mkdir(parents=True, exist_ok=True)
            error_file = folder / "error.json"
            error_file.unlink(missing_ok=True)
            destination.error_files[local_rank] = env["TORCHELASTIC_ERROR_FILE"] = str(error_file)
            to_terminal = self._output == "first" and env["RANK"] == "0"
            destination.stdouts[local_rank] = "" if to_terminal else str(folder / "stdout.log")
            destination.stderrs[local_rank] = "" if to_terminal else str(folder / "stderr.log")
            if to_terminal:
                env["LIGHTLITE_FAILURE_SHOWN_BY_LAUNCHER"] = "1"
            if self._output == "tee":
                destination.tee_stdouts[local_rank] = destination.stdouts[local_rank]
                destination.tee_stderrs[local_rank] = destination.stderrs[local_rank]
        return destination


class RankAgent(LocalElasticAgent):
    """Elastic's agent of one machine, with lightlite's way of ending ranks.

    It differs in three things: a signal goes to the ranks and not to their data-loader workers, which a rank
    ends itself; whatever is left of a rank's process group after `grace` seconds is killed; and it knows which
    rank failed first.

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
        self.failure: Failure | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ids: dict[int, Any] = super()._start_workers(worker_group)
        self._guard.watch(ids.values())
        self._last_poll = time.time()
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        failures = self._failures(worker_group)
        if not failures:
            self._last_poll = time.time()
            healthy: RunResult = super()._monitor_workers(worker_group)
            return healthy
        failures = self._with_cause(worker_group, failures)
        self._end_ranks(signal.SIGTERM, spare={failure.pid for failure in failures})
        result: RunResult = super()._monitor_workers(worker_group)
        self.failure = first_cause(failures)
        left = self._remaining_restarts
        if left:
            report(self.failure, self._logs_specs.root_log_dir, f"; starting all ranks anew (restarts left: {left})")
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
        """Wait a moment where all that failed only lost another rank: that one may still be on its way out."""
        deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
        while (
            all(failure.is_consequence for failure in failures)
            and len(failures) < len(self._processes())
            and time.monotonic() < deadline
        ):
            time.sleep(MONITOR_INTERVAL / 2)
            failures = self._failures(worker_group)
        return failures

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        processes = self._processes()
        if any(process.poll() != 0 for process in processes.values()):
            self._end_ranks(death_sig)
        self._guard.forget(process.pid for process in processes.values())
        super()._shutdown(death_sig, timeout)

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        return {local_rank: handler.proc for local_rank, handler in self._pcontext.subprocess_handlers.items()}

    def _end_ranks(self, death_sig: signal.Signals, spare: Iterable[int] = ()) -> None:
        """Signal the ranks, wait until they have ended, kill whatever is left of them.

        Args:
            death_sig: What the ranks get first.
            spare: Pids of ranks that are ending by themselves and only have to be waited for.
        """
        processes = self._processes().values()
        with _second_interrupt() as hurry:
            for process in processes:
                if process.pid not in spare:
                    process.send_signal(death_sig)
            deadline = time.monotonic() + self._grace
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if hurry.wait(0.02):
                    break
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)  # one that hangs in the kernel cannot be waited for


@contextlib.contextmanager
def _second_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. Signals that come twice, as `timeout` sends them, change nothing meanwhile."""
    hurry = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            hurry.set()

    if threading.current_thread() is not threading.main_thread():
        yield hurry
        return
    before = {
        number: signal.signal(number, handle) for number in (getattr(signal, name) for name in SIGNALS.split(","))
    }
    try:
        yield hurry
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(failure: Failure, log_dir: str | None, note: str = "") -> None:
    """Tell on standard error which rank failed. The rank's own words come last."""
    sys.stdout.flush()
    start = "\n" if sys.stderr.isatty() else ""
    logs = f"The output of all ranks is in {log_dir}\n" if log_dir else ""
    sys.stderr.write(f"{start}{logs}{failure.describe(note)}")
    sys.stderr.flush()


def run(launch: Launch) -> int:
    """Run the ranks of this machine until they end.

    Returns:
        0, or the exit code of the rank that failed first; 128 + the signal's number for a signal, be it the
        rank's or this process's.
    """
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)  # elastic's own account of a failure would drown the rank's
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SIGNALS
    os.environ["LIGHTLITE_LAUNCHER_PID"] = str(os.getpid())
    with contextlib.ExitStack() as stack:
        folder = launch.log_dir
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lightlite-", ignore_cleanup_errors=True))
        guard = stack.enter_context(Guard(folder if launch.log_dir is None else None))
        try:
            handler = _rendezvous(launch)
            agent = RankAgent(_spec(launch, handler), RankLogs(folder, launch.output), guard, launch.grace)
            result = agent.run()
        except SignalException as received:
            return 128 + received.sigval
        except (RendezvousError, DistError) as error:
            where = launch.endpoint or LOOPBACK
            sys.stderr.write(f"lightlite.launch: the ranks could not meet at {where}: {_chain(error)}\n")
            return 1
        except OSError as error:
            sys.stderr.write(f"lightlite.launch: the ranks could not be started: {_chain(error)}\n")
            return 1
        handler.shutdown()
        if result is None or not result.is_failed():
            return 0
        assert agent.failure is not None
        report(agent.failure, launch.log_dir)
        return agent.failure.status


def _rendezvous(launch: Launch) -> RendezvousHandler:
    register_loopback()
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
    host, _, port = launch.endpoint.rpartition(":")
    static = launch.backend == "static"
    return WorkerSpec(
        role="rank",
        local_world_size=launch.local_world_size,
        entrypoint=program,
        args=tuple(argument.replace("$", "$$") for argument in arguments),  # elastic substitutes ${local_rank}
        rdzv_handler=handler,
        max_restarts=launch.max_restarts,
        monitor_interval=MONITOR_INTERVAL,
        master_addr=host if static else None,
        master_port=int(port) if static else None,
        local_addr=launch.local_addr,
    )


def _chain(error: BaseException | None) -> str:
    """An error and what caused it, as one line."""
    parts = []
    while error is not None:
        parts.append(f"{type(error).__name__}: {error}".splitlines()[0])
        error = error.__cause__
    return " <- ".join(parts)
