from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import RankFailedError
from lightlite.launch import helpers
from lightlite.launch.helpers import HelperPool


class OwnError(Exception):
    pass


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("not for others")
        self.lock = threading.Lock()


@pytest.fixture
def pool() -> Iterator[HelperPool]:
    helpers._end_all()  # those that an earlier test of this process has left warm
    pool = HelperPool(3)
    yield pool
    pool.close()


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def hello(ranks: Ranks) -> int:
    distributed.join(ranks, "gloo")
    return len(distributed.gather_objects(None))


def fail(pool: HelperPool, act: Callable[[], Any], *, culprit: int = 2, others: Callable[[], Any] | None = None) -> Any:
    """What a run raises in which one rank acts and the others wait for it; then nobody is left, and a run works."""

    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo")
        distributed.barrier()
        if ranks.rank == culprit:
            act()
        elif others is not None:
            others()
        distributed.barrier()

    pool.run(hello)
    start = time.monotonic()
    with pytest.raises(BaseException) as caught:
        pool.run(work)
    assert time.monotonic() - start < 5
    assert children() == []
    assert not distributed.is_joined()
    assert pool.run(hello) == 3
    return caught.value


def raise_value_error() -> None:
    raise ValueError("boom on one rank")


def hang() -> None:
    while True:
        time.sleep(60)


def test_an_exception_arrives_as_itself_with_the_traceback_of_its_rank_as_the_cause(pool: HelperPool) -> None:
    error = fail(pool, raise_value_error)
    assert type(error) is ValueError
    assert str(error) == "boom on one rank"
    cause = error.__cause__
    assert isinstance(cause, RankFailedError)
    assert cause.rank == 2
    headline, *lines = str(cause).splitlines()
    assert re.fullmatch(r"rank 2 \(host \S+, pid \d+\) failed:", headline)
    assert lines[0] == "Traceback (most recent call last):"
    assert "in raise_value_error" in str(cause)
    assert lines[-1] == "ValueError: boom on one rank"
    assert str(cause).endswith(cause.remote_traceback)


def test_an_exception_of_a_class_of_ones_own_is_caught_as_such(pool: HelperPool) -> None:
    def act() -> None:
        raise OwnError(3)

    error = fail(pool, act)
    assert type(error) is OwnError
    assert error.args == (3,)


def test_an_exception_that_cannot_be_sent_leaves_its_traceback(pool: HelperPool) -> None:
    def act() -> None:
        raise Unpicklable

    error = fail(pool, act)
    assert type(error) is RankFailedError
    assert str(error).endswith("Unpicklable: not for others")


@pytest.mark.parametrize(
    ("act", "exitcode", "words"),
    [
        (lambda: os._exit(3), 3, "exited with code 3"),
        (lambda: sys.exit(0), 0, "exited with code 0:"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, "was killed by SIGKILL"),
    ],
    ids=["os._exit", "sys.exit", "SIGKILL"],
)
def test_a_helper_that_ends_is_named_with_its_exit_code(
    pool: HelperPool, act: Callable[[], Any], exitcode: int, words: str
) -> None:
    error = fail(pool, act)
    assert type(error) is RankFailedError
    assert (error.rank, error.exitcode) == (2, exitcode)
    assert re.match(rf"rank 2 \(host \S+, pid \d+\) {words}", str(error))


def test_a_helper_that_asks_to_exit_makes_the_caller_exit_with_its_code(
    pool: HelperPool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fail(pool, lambda: sys.exit(4))
    assert type(error) is SystemExit
    assert error.code == 4
    told = capsys.readouterr().err
    assert re.match(r"rank 2 \(host \S+, pid \d+\) exited with code 4:\nTraceback", told)
    assert told.endswith("SystemExit: 4\n")


def test_a_rank_zero_that_hangs_in_python_is_told(pool: HelperPool) -> None:
    error = fail(pool, raise_value_error, others=hang)
    assert type(error) is ValueError


def test_a_rank_zero_that_hangs_in_another_thread_is_told(pool: HelperPool) -> None:
    raised: list[BaseException] = []

    def spin() -> None:
        while True:
            time.sleep(0.01)

    def run() -> None:
        raised.append(fail(pool, raise_value_error, others=spin))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert type(raised[0]) is ValueError


TOLD_IN_A_THREAD = """
import cProfile, threading, time
from lightlite.launch.helpers import HelperPool

def work(ranks):
    if ranks.rank == 1:
        raise ValueError
    while True:
        time.sleep(0.01)

def call():
    try:
        HelperPool(2).run(work)
    except ValueError:
        print("told")

thread = threading.Thread(target=call)
thread.start()
thread.join()
cProfile.Profile().runcall(str.upper, "a")
cProfile.Profile().runcall(lambda: print("profiled"))
"""


def test_a_thread_that_was_told_leaves_nothing_that_a_profiler_stumbles_over(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOLD_IN_A_THREAD)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["told", "profiled"], done.stderr


def test_a_failure_before_the_ranks_have_met_frees_those_who_wait(pool: HelperPool) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise LookupError("early")
        distributed.join(ranks, "gloo")

    pool.run(hello)
    start = time.monotonic()
    with pytest.raises(LookupError, match="early"):
        pool.run(work)
    assert time.monotonic() - start < 5
    assert pool.run(hello) == 3


@pytest.mark.parametrize("error", [OwnError("zero"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_what_rank_zero_raises_passes_through_untouched(pool: HelperPool, error: BaseException) -> None:
    def act() -> None:
        raise error

    raised = fail(pool, act, culprit=0, others=hang)
    assert raised is error
    assert raised.__cause__ is None


def test_a_stopped_helper_is_ended_too(pool: HelperPool) -> None:
    def act() -> None:
        raise OwnError("zero")

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    assert type(fail(pool, act, culprit=0, others=stop)) is OwnError


def test_an_interrupt_reaches_a_rank_zero_that_waits_for_the_others(pool: HelperPool) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank:
            hang()

    pool.run(hello)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(work)
    assert children() == []


def test_loader_workers_of_a_failing_helper_end_with_it(pool: HelperPool) -> None:
    class Slow(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> int:
            if index:
                time.sleep(100)
            return index

    def act() -> None:
        batches = iter(DataLoader(Slow(), num_workers=2))
        next(batches)
        os._exit(5)

    assert fail(pool, act).exitcode == 5


CALLER = """
import ctypes, os, subprocess, sys, time
import torch
from torch.utils.data import DataLoader
from lightlite import distributed
from lightlite.launch import helpers
from lightlite.launch.helpers import HelperPool

def slow(items):
    time.sleep(0.05)
    return items

def work(ranks, folder):
    distributed.join(ranks, "gloo")
    loader = iter(DataLoader(range(10000), batch_size=1, num_workers=1, collate_fn=slow))
    next(loader)
    if ranks.rank == 1:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
    distributed.barrier()
    if ranks.rank == 0:
        print("ready", flush=True)
    if sys.argv[1] == "lock" and ranks.rank == 1:
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock, so that no thread of the helper runs
    if sys.argv[1] == "collective" and ranks.rank == 1:
        distributed.barrier()
    while True:
        time.sleep(0.1)

HelperPool(3).run(work, None)
"""


@pytest.mark.parametrize("where", ["python", "collective", "lock"])
def test_a_killed_caller_leaves_nothing_and_only_loopback_was_listened_on(tmp_path: Path, where: str) -> None:
    script = tmp_path / "caller.py"
    script.write_text(textwrap.dedent(CALLER))
    temporary = tmp_path / "t"
    temporary.mkdir()
    environ = {**os.environ, "TMPDIR": str(temporary)}
    caller = subprocess.Popen([sys.executable, str(script), where], stdout=subprocess.PIPE, text=True, env=environ)
    with caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
        family = [psutil.Process(caller.pid), *psutil.Process(caller.pid).children(recursive=True)]
        assert len(family) == 8  # three ranks with a loader worker each, the guard, and what a helper has started
        listening = {
            connection.laddr.ip
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        caller.kill()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert list(temporary.iterdir()) == []
