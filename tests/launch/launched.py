"""Launches from the command line, for tests: start one, wait until its ranks are ready, see that all of it is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TWO_ON_CPU = ("--devices", "2", "--accelerator", "cpu")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lightlite.launch", *arguments]


def launch(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


@contextmanager
def running(script: str, *arguments: str, options: tuple[str, ...] = TWO_ON_CPU) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose two ranks are ready; everything it started is gone afterwards, whatever the test does."""
    write("script.py", script)
    process = subprocess.Popen(
        command(*options, "script.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    tree: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 40
        while not all(Path(f"ready-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline, "the ranks did not start"
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        tree = psutil.Process(process.pid).children(recursive=True)
        process.tree = tree  # type: ignore[attr-defined]
        yield process
    finally:
        process.kill()  # before all others, for one of them is the guard, which cleans up behind it
        process.wait()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for member in alive:
            with suppress(psutil.Error):
                member.kill()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def lives(process: psutil.Process) -> bool:
    """Whether a process runs. An orphan that is dead may wait for long until init takes note of it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Fail if one of the processes lives on after the given time."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if lives(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
