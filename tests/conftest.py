"""What every test has: a folder of its own, one thread, and a session that must leave no process behind."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

SESSION_VARIABLE = "LIGHTLITE_TEST_SESSION"
os.environ.setdefault(SESSION_VARIABLE, uuid.uuid4().hex)
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is for what a shell starts in the background; here and in what the tests start, Ctrl-C has to work.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logs and checkpoints land in the test's folder; environment variables set by a run do not outlive the test."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def seeded() -> int:
    """Python's, numpy's and torch's random generators at a known seed, which is returned."""
    seed = 1234
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def _left_behind() -> list[psutil.Process]:
    """Processes started by the tests of this session that no longer belong to a process that runs tests."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(SESSION_VARIABLE)
            if process.pid not in own and mark == os.environ[SESSION_VARIABLE]:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session for processes that outlived the test that started them."""
    if hasattr(session.config, "workerinput"):
        return  # the process that started the workers looks, once they have ended
    deadline = time.monotonic() + 10
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        for process in left:
            session.config.get_terminal_writer().line(f"\nleft behind by a test: {process}")
            process.kill()
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
