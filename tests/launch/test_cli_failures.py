"""How runs from the command line fail: who is blamed, what is said last, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launched import TWO_ON_CPU, command, launch, lives, running, wait_gone, write

from lightlite.launch import echoes
from lightlite.launch.failure import Failure

HOST = socket.gethostname()

HANG = """
import os, re, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from lightlite import distributed
from lightlite.launch.environment import TorchElasticEnvironment

ranks = TorchElasticEnvironment().ranks()
how, culprit = sys.argv[1], int(sys.argv[2])

def hang():
    if how == "spin":
        while True: pass
    if how == "lock":
        re.match("(a+)+$", "a" * 60 + "b")  # for longer than anybody lives, holding the interpreter's lock
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "recv":
        dist.recv(torch.zeros(1), src=1 - culprit)

distributed.join(ranks, "gloo", timedelta(seconds=10))
group = dist.new_group(timeout=timedelta(seconds=2))
dist.all_reduce(torch.ones(1))
if ranks.rank == culprit:
    print("culprit", os.getpid(), flush=True)
    hang()
dist.all_reduce(torch.ones(1), group=group)
"""

TRAINER = """
import sys, time
import torch
import lightlite as pl

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            time.sleep(1000)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

pl.Trainer(timeout=4, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False).fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 4)))
"""

END = """
import os, resource, signal, sys, threading
how = sys.argv[1]

class Dataset:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise KeyError("no such sample")

if os.environ["RANK"] == sys.argv[2]:
    sys.stderr.write("last words\\n")
    sys.stderr.flush()
    if how == "os._exit":
        os._exit(7)
    if how == "exit with text":
        sys.exit("nothing to do")
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        bytearray(2**33)
    if how == "worker":
        from torch.utils.data import DataLoader
        next(iter(DataLoader(Dataset(), num_workers=1)))
    if how == "thread":
        thread = threading.Thread(target=lambda: 1 // 0, name="worker")
        thread.start()
        thread.join()
"""

FAMILY = """
import multiprocessing.util, os, signal, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

rank = os.environ["RANK"]
shared = SharedMemory(create=True, size=64)
semaphore = multiprocessing.get_context("spawn").Semaphore()
Path(multiprocessing.util.get_temp_dir(), "socket").touch()
sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
started = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
daemon = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=2).pid)"
started.append(int(subprocess.run([sys.executable, "-c", daemon, *sleep], stdout=subprocess.PIPE).stdout))
Path(f"family-{rank}").write_text("\\n".join(map(str, [*started, shared.name, "sem." + semaphore._semlock.name[1:]])))
Path(f"ready-{rank}").write_text(str(os.getpid()))
while True:
    if rank == "1" and os.path.exists("leave"):
        os._exit(7)
    time.sleep(0.05)
"""

INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path

rank = os.environ["RANK"]
Path(f"ready-{rank}").write_text(str(os.getpid()))
try:
    time.sleep(1000)
except KeyboardInterrupt:
    Path(f"first-{rank}").touch()
    try:
        time.sleep(1000 if "stubborn" in sys.argv else 0.5)
    except KeyboardInterrupt:
        Path(f"second-{rank}").touch()
    Path(f"saved-{rank}").touch()
    raise
"""


@pytest.fixture(autouse=True)
def _temporary_folder_is_empty_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a run leaves in the folder for temporary files, for five seconds, fails the test."""
    folder = Path("t").resolve()
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path("cache").resolve()))  # which torch keeps for the next time
    yield
    wait_until(lambda: not list(folder.iterdir()), f"left in {folder}: {list(folder.iterdir())}")


def wait_until(condition: object, what: str, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("how", "culprit", "said", "last"),
    [
        ("lock", 0, "for more than 2 s; it was here:", "return _compile(pattern, flags).match(string)"),
        ("stop", 1, "for more than 2 s; it is stopped (SIGSTOP)", "for more than 2 s; it is stopped (SIGSTOP)"),
    ],
)
def test_a_rank_that_hangs_is_blamed_and_its_place_shown(how: str, culprit: int, said: str, last: str) -> None:
    result = launch(*TWO_ON_CPU, write("script.py", HANG), how, str(culprit))
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[0].startswith(f"rank {culprit} (host {HOST}, pid ")
    assert lines[0].endswith(f"kept the other ranks waiting {said}")
    assert lines[-1].strip().endswith(last)
    assert "entry.py" not in result.stderr
    if culprit == 0:
        assert f"pid {result.stdout.split()[1]})" in lines[0]


def test_a_rank_that_hangs_longer_than_the_trainers_timeout_ends_the_run() -> None:
    result = launch(*TWO_ON_CPU, write("script.py", TRAINER))
    assert result.returncode == 1
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("rank 1 (host ")
    assert first.endswith("kept the other ranks waiting for more than 4 s; it was here:")
    assert last == "    time.sleep(1000)"


@pytest.mark.parametrize(
    ("text", "timeout", "seconds"),
    [
        ("RuntimeError: [x/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", True, 5.0),
        ("DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cpu//0/rank_1", True, 300.0),
        ("DistStoreError: Timed out after 6 seconds waiting for clients. 1/2 clients joined.", True, 6.0),
        ("DistNetworkError: The client socket has timed out after 4000ms while trying to connect", True, 4.0),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(Timeout(ms)=600000) ran for 600012 "
         "milliseconds before timing out.", True, 600.0),
        ("RuntimeError: [x/pair.cc:553] Connection closed by peer [127.0.0.1]:35475.", False, None),
        ("DistBackendError: NCCL error: remote process exited or there was a network error", False, None),
    ],
)  # fmt: skip
def test_the_words_of_a_missed_rank_are_known(text: str, timeout: bool, seconds: float | None) -> None:
    assert echoes.is_echo(text)
    assert (echoes.is_timeout(text), echoes.seconds_waited(text)) == (timeout, seconds)


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: boom",
        "TimeoutError: no answer in 5 s",
        "RuntimeError: shape mismatch",
        "RuntimeError: DataLoader timed out after 30 seconds",
    ],
)
def test_a_ranks_own_words_are_not_taken_for_an_echo(text: str) -> None:
    assert not echoes.is_echo(text)


@pytest.mark.parametrize("text", ["ConnectionResetError: connection reset by peer", "ValueError: gloo is a word"])
def test_only_what_torch_raises_is_taken_for_an_echo_of_another_rank(text: str) -> None:
    assert not Failure(1, 2, 1, 0.0, origin=text).is_consequence
    assert Failure(1, 2, 1, 0.0, origin=f"RuntimeError: {text}").is_consequence


@pytest.mark.parametrize(
    ("how", "rank", "code", "headline", "last"),
    [
        ("os._exit", 1, 7, "failed with exit code 7:", "last words"),
        ("exit with text", 1, 1, "failed with exit code 1:", "nothing to do"),
        ("crash", 1, 139, "was killed by SIGSEGV (signal 11), exit code 139:", None),
        ("memory", 1, 1, "failed with exit code 1:", "MemoryError"),
        ("worker", 0, 1, "failed with exit code 1:", "KeyError: 'no such sample'"),
    ],
)
def test_the_last_lines_are_those_of_the_rank_that_failed(
    how: str, rank: int, code: int, headline: str, last: str | None
) -> None:
    result = launch(*TWO_ON_CPU, write("script.py", END), how, str(rank))
    lines = result.stderr.splitlines()
    index = next(index for index, line in enumerate(lines) if line.startswith("rank "))
    assert result.returncode == code
    assert lines[index].startswith(f"rank {rank} (host {HOST}, pid ")
    assert lines[index].endswith(headline)
    if last is not None:
        assert lines[-1] == last
    if how == "crash":
        assert "Fatal Python error: Segmentation fault" in lines[index + 1 :]
        assert any('script.py", line' in line for line in lines[index + 1 :])


def test_an_exception_in_a_thread_ends_no_rank() -> None:
    result = launch(*TWO_ON_CPU, write("script.py", END), "thread", "0")
    assert result.returncode == 0
    assert "Exception in thread worker" in result.stderr


def test_a_rank_that_left_before_the_others_is_named() -> None:
    script = HANG.replace("    hang()\n", "    os._exit(0)\n")
    result = launch(*TWO_ON_CPU, write("script.py", script), "", "1")
    assert result.returncode == 1
    assert "; rank 1 had ended before, with exit code 0:" in result.stderr.splitlines()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of processes that left their group")
@pytest.mark.parametrize("ended", ["rank 0", "rank 1", "launcher"])
def test_nothing_that_a_rank_started_or_shared_outlives_the_run(ended: str) -> None:
    with running(FAMILY) as launcher:
        left = [Path(f"family-{rank}").read_text().split("\n") for rank in range(2)]
        family = [psutil.Process(int(pid)) for pids in left for pid in pids[:3]]
        files = [Path("/dev/shm", name) for names in left for name in names[3:]]
        assert all(path.exists() for path in files)
        assert all(lives(process) for process in family)
        started = time.monotonic()
        if ended == "rank 1":
            Path("leave").touch()
        else:
            os.kill(launcher.pid if ended == "launcher" else int(Path("ready-0").read_text()), signal.SIGKILL)
        _, stderr = launcher.communicate(timeout=5)
        wait_gone([*family, *launcher.tree], 5 - (time.monotonic() - started))
        assert not [path for path in files if path.exists()]
    code, said = {
        "rank 0": (137, f"rank 0 (host {HOST}, pid {Path('ready-0').read_text()}) was killed by SIGKILL (signal 9)"),
        "rank 1": (7, f"rank 1 (host {HOST}, pid {Path('ready-1').read_text()}) failed with exit code 7"),
        "launcher": (-9, ""),
    }[ended]
    assert launcher.returncode == code
    assert said in stderr


@pytest.mark.parametrize("script", ["stubborn", "saving"])
def test_an_interrupt_at_the_terminal_reaches_each_rank_once_and_a_second_one_ends_all(script: str) -> None:
    """The launcher is in a process group of its own, as a shell would start it; its ranks hear of Ctrl-C by it only."""
    write("script.py", INTERRUPTED)
    options = (*TWO_ON_CPU, "--grace", "30")
    process = subprocess.Popen(
        command(*options, "script.py", script), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: all(Path(f"ready-{rank}").exists() for rank in range(2)), "the ranks did not start", 40)
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: all(Path(f"first-{rank}").exists() for rank in range(2)), "the ranks were not interrupted")
        if script == "stubborn":
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=5)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert stderr == ""
    assert [Path(f"saved-{rank}").exists() for rank in range(2)] == [script == "saving"] * 2
    assert not list(Path().glob("second-*"))
    wait_until(lambda: not any(psutil.pid_exists(int(path.read_text())) for path in Path().glob("ready-*")), "alive")


@pytest.mark.parametrize(
    ("seconds", "number"), [(0.5, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL), (2, signal.SIGINT)]
)
def test_a_launcher_that_is_ended_while_it_starts_leaves_nothing(seconds: float, number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    write("script.py", INTERRUPTED)
    environ = {**os.environ, "LAUNCH_OF_THE_TEST": mark}
    process = subprocess.Popen(command(*TWO_ON_CPU, "script.py"), stderr=subprocess.PIPE, env=environ)
    time.sleep(seconds)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode in (-number, 128 + number)
    wait_until(lambda: not marked(mark), "alive")
    time.sleep(1)  # one that was just being started would show up by then
    assert marked(mark) == []


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LAUNCH_OF_THE_TEST") == mark and lives(process):
                found.append(process)
    return found
