"""Ranks that hang, in a script: who is blamed, what the caller learns, and that all is over soon and works again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import RankTimeoutError
from lightlite.launch import helpers, supervise
from lightlite.launch.helpers import HelperPool

TIMEOUT = timedelta(seconds=1)
SOON = 6.0
"""Seconds, on a busy machine, for what takes 1 of timeout, 1 of patience and half of one of grace."""


@pytest.fixture
def pool() -> Iterator[HelperPool]:
    helpers._end_all()  # those that an earlier test of this process has left warm
    pool = HelperPool(3)
    yield pool
    pool.close()


def hello(ranks: Ranks) -> int:
    distributed.join(ranks, "gloo")
    return len(distributed.gather_objects(None))


def hang_here() -> None:
    while True:
        time.sleep(0.01)


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_a_message_that_nobody_sends() -> None:
    dist.recv(torch.zeros(1), src=(dist.get_rank() + 1) % dist.get_world_size())


def hang(pool: HelperPool, act: Callable[[], Any], culprit: int) -> BaseException:
    """What a run raises in which one rank acts while the others wait for it; then nobody is left, and a run works."""

    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo", TIMEOUT)
        distributed.barrier()
        if ranks.rank == culprit:
            act()
        distributed.barrier()

    pool.run(hello)
    start = time.monotonic()
    with pytest.raises(BaseException) as caught:
        pool.run(work)
    assert time.monotonic() - start < SOON
    assert psutil.Process().children(recursive=True) == []
    assert not distributed.is_joined()
    assert pool.run(hello) == 3
    return caught.value


def test_a_helper_that_hangs_in_python_is_blamed_and_its_stack_shown(pool: HelperPool) -> None:
    error = hang(pool, hang_here, culprit=2)
    assert type(error) is RankTimeoutError
    assert error.rank == 2
    headline, *stack = str(error).splitlines()
    assert headline.endswith("kept the other ranks waiting for more than 1 s; it was here:")
    assert stack[-1].strip() == "time.sleep(0.01)"
    assert "hang_here" in stack[-2]
    assert "worker.py" not in str(error)


def test_a_helper_that_is_stopped_is_blamed(pool: HelperPool) -> None:
    error = hang(pool, stop_here, culprit=1)
    assert type(error) is RankTimeoutError
    assert str(error).startswith("rank 1 (host ")
    assert str(error).endswith("kept the other ranks waiting for more than 1 s; it is stopped (SIGSTOP)")


def test_a_rank_zero_that_hangs_in_python_is_interrupted_where_it_hangs(pool: HelperPool) -> None:
    error = hang(pool, hang_here, culprit=0)
    assert type(error) is RankTimeoutError
    assert error.rank == 0
    assert str(error).startswith(f"rank 0 (host {os.uname().nodename}, pid {os.getpid()}) kept the other ranks waiting")
    assert error.__cause__ is not None
    trace = error.__cause__.__traceback__
    functions = []
    while trace is not None:
        functions.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "hang_here" in functions


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_waits_in_a_collective_of_its_own_shows_up_with_those_it_waited_for(
    pool: HelperPool, culprit: int
) -> None:
    error = hang(pool, wait_for_a_message_that_nobody_sends, culprit=culprit)
    assert type(error) is RankTimeoutError
    assert "waited for more than 1 s for ranks that did not come" in str(error)
    assert "wait_for_a_message_that_nobody_sends" in str(error)


def test_a_helper_that_waits_for_ranks_that_are_done_is_shown(pool: HelperPool) -> None:
    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo", TIMEOUT)
        distributed.barrier()
        if ranks.rank == 1:
            wait_for_a_message_that_nobody_sends()

    with pytest.raises((RankTimeoutError, RuntimeError), match=r"did not come|Connection closed") as caught:
        pool.run(work)
    assert "wait_for_a_message_that_nobody_sends" in str(caught.value) + str(caught.value.__cause__)


def test_a_slow_start_is_not_taken_for_hanging() -> None:
    """Helpers that are started for the run import torch while rank 0 waits, for longer than the timeout."""
    pool = HelperPool(2)
    try:
        start = time.monotonic()
        joined = pool.run(lambda ranks: distributed.join(ranks, "gloo", timedelta(milliseconds=50)))
        assert joined
        assert time.monotonic() - start > 0.05
    finally:
        pool.close()


def test_of_several_that_are_still_there_the_stopped_one_is_blamed(pool: HelperPool) -> None:
    """Rank 1 has not given up yet when rank 0 has, for it waits in a group that is more patient."""

    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo", TIMEOUT)
        patient = dist.new_group(timeout=timedelta(minutes=1))
        distributed.barrier()
        if ranks.rank == 2:
            stop_here()
        dist.barrier(group=patient if ranks.rank == 1 else None)

    with pytest.raises(RankTimeoutError, match=r"rank 2 .*; it is stopped \(SIGSTOP\)"):
        pool.run(work)


@pytest.mark.parametrize(("code", "seen"), [(-1, 255), (3, 3), ("nothing to do", 1)])
def test_a_helper_that_asks_to_exit_gives_the_code_that_a_shell_would_see(
    pool: HelperPool, code: object, seen: int
) -> None:
    def work(ranks: Ranks) -> None:
        distributed.join(ranks, "gloo")
        if ranks.rank == 1:
            sys.exit(code)  # type: ignore[arg-type]
        distributed.barrier()

    with pytest.raises(SystemExit) as caught:
        pool.run(work)
    assert caught.value.code == seen


def test_an_interrupt_that_the_users_code_handles_ends_nothing(pool: HelperPool) -> None:
    def work(ranks: Ranks) -> int:
        distributed.join(ranks, "gloo")
        if ranks.rank == 0:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            time.sleep(2 * supervise.NOTICE)
        return len(distributed.gather_objects(None))

    assert pool.run(work) == 3


def test_in_another_thread_a_hanging_rank_zero_is_interrupted_too(pool: HelperPool) -> None:
    caught: list[BaseException] = []
    thread = threading.Thread(target=lambda: caught.append(hang(pool, hang_here, culprit=0)))
    thread.start()
    thread.join(60)
    assert type(caught[0]) is RankTimeoutError


SCRIPT = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader
import lightlite as pl

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 0:
            print(os.getpid(), flush=True)
            {act}
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Note(pl.Callback):
    def on_exception(self, trainer, module, error):
        print("on_exception", type(error).__name__, flush=True)

trainer = pl.Trainer(
    devices=2, accelerator="cpu", max_epochs=1, timeout={timeout}, callbacks=[Note()], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
loader = DataLoader(torch.randn(32, 4), batch_size=2)
{call}
"""


def script(
    folder: Path, act: str, call: str = "trainer.fit(Model(), loader)", timeout: float = 1
) -> subprocess.Popen[str]:
    path = folder / "train.py"
    path.write_text(SCRIPT.format(act=act, call=textwrap.dedent(call), timeout=timeout))
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _started.append(process)
    return process


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _end_scripts() -> Iterator[None]:
    """A script that its test did not see end does not stay for the tests after it."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.communicate()


def test_a_calling_process_that_is_stopped_is_woken_to_learn_that_the_run_is_over(tmp_path: Path) -> None:
    process = script(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert "rank 0 (host " in last
    assert last.endswith("kept the other ranks waiting for more than 1 s; it is stopped (SIGSTOP)")
    assert out.splitlines()[-1] == "on_exception RankTimeoutError"


def test_callbacks_learn_of_the_other_ranks_failure_and_not_of_its_echo(tmp_path: Path) -> None:
    call = """
    Model.training_step = lambda self, batch, batch_idx: os._exit(5) if self.global_rank else self.layer(batch).sum()
    trainer.fit(Model(), loader)
    """
    out, err = script(tmp_path, "pass", call, timeout=60).communicate(timeout=60)
    assert out.split() == ["on_exception", "RankFailedError"]
    assert "exited with code 5" in err.splitlines()[-1]


def test_a_second_interrupt_ends_helpers_that_do_not_care_for_the_first(tmp_path: Path) -> None:
    call = """
    from lightlite.launch import supervise
    supervise.GRACE = 60.0
    def on_sigterm(*_):
        while True:
            time.sleep(1)
    def training_step(self, batch, batch_idx):
        if self.global_rank:
            signal.signal(signal.SIGTERM, on_sigterm)
        if batch_idx == 2 and self.global_rank == 0:
            processes = __import__("psutil").Process().children()
            print(next(each.pid for each in processes if "lightlite.launch.worker" in each.cmdline()), flush=True)
            time.sleep(60)
        return self.layer(batch).sum()
    Model.training_step = training_step
    try:
        trainer.fit(Model(), loader)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    """
    process = script(tmp_path, "pass", call, timeout=60)
    assert process.stdout is not None
    helper = psutil.Process(int(process.stdout.readline()))
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "on_exception KeyboardInterrupt\n"
    time.sleep(0.3)  # whatever the moment, the second interrupt must end it
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - start < SOON
    assert not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE
