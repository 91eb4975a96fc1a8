"""The agent of one machine among several."""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.multiprocessing import SignalException

from lightlite.launch import hanging
from lightlite.launch.agent import PATIENCE, Cause, RankAgent
from lightlite.launch.failure import Failure
from lightlite.launch.machines import Notice, Watch
from lightlite.launch.meeting import Meeting


class NodeAgent(RankAgent):
    """Elastic's agent where there are other machines: what ends the ranks of one ends those of all.

    It tells the others of its ranks' failures and hears of theirs; so all know the cause. It notices that a machine
    is lost. And it stays until the ranks of all machines have ended.
    """

    _looked_in: Watch | None = None

    @property
    def _meeting(self) -> Meeting:
        handler = self._rdzv_handler
        assert isinstance(handler, Meeting)
        return handler

    @property
    def _watch(self) -> Watch:
        watch = self._meeting.watch
        assert watch is not None
        return watch

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Run the ranks until they end here and elsewhere, and leave the run."""
        try:
            result: RunResult = super().run(role)
        except BaseException:
            self._meeting.leave()
            raise
        self._meeting.shutdown()
        return result

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            result: RunResult = super()._invoke_run(role)
        except SignalException as received:
            watch = self._meeting.watch
            if watch is not None:
                name = signal.Signals(received.sigval).name
                watch.tell_failure(f"{watch.here} was told to end by {name}", 128 + received.sigval)
            raise
        return result

    def _exit_barrier(self) -> None:
        """Nothing: `_monitor_workers` reports no success before all machines have ended."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        verdict = self._watch.verdict()
        if verdict is not None and verdict.kind == "regroup":
            sys.stderr.write(f"lightlite.launch: {verdict.headline}; starting all ranks anew\n")
            return RunResult(state=WorkerState.HEALTHY)  # elastic asks for joining machines next
        if verdict is not None and not self._failures(worker_group):
            self._end_ranks(signal.SIGTERM)
            return self._settle_for(RunResult(state=WorkerState.FAILED), verdict)
        if verdict is None and not self._failures(worker_group):
            self._look_for_hanging(worker_group)
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.SUCCEEDED and not self._watch.finish():
            return RunResult(state=WorkerState.HEALTHY)
        return result

    def _hanging(self, worker_group: WorkerGroup, failures: list[Failure]) -> Failure | None:
        """As on a single machine; and now that this machine's part is known, before its ranks are ended, tell it."""
        found = super()._hanging(worker_group, failures)
        if found is not None and hanging.waits(found.traceback):
            found = None  # it waits for another machine's
        cause = found or self._with_remark(worker_group, failures)
        is_consequence = found is None and cause.is_consequence
        timeout = cause.timeout if is_consequence else ""
        self._watch.tell_failure(cause.describe(), cause.status, is_consequence=is_consequence, timeout=timeout)
        return found

    def _look_for_hanging(self, worker_group: WorkerGroup) -> None:
        """Where ranks elsewhere have waited in vain and those of here have not, one of here may be why."""
        timeout = self._watch.timeout_elsewhere(PATIENCE)
        running = self._running([])
        if not timeout or not running or self._looked_in is self._watch:
            return
        self._looked_in = self._watch
        found = self._waited_for(worker_group, running, timeout)
        if not hanging.waits(found.traceback):
            self._watch.tell_failure(found.describe(), found.status)

    def _settle(self, result: RunResult, cause: Cause) -> RunResult:
        verdict = self._watch.wait_for_verdict(is_consequence=isinstance(cause, Failure) and cause.is_consequence)
        return self._settle_for(result, verdict) if verdict is not None else super()._settle(result, cause)

    def _settle_for(self, result: RunResult, verdict: Notice) -> RunResult:
        """Take over what all machines hold for the cause."""
        if verdict.kind == "regroup":
            return RunResult(state=WorkerState.HEALTHY)
        if verdict.final:
            self._remaining_restarts = 0
        return super()._settle(result, verdict)
