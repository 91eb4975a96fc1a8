"""The command line, with real processes: what the ranks get, what is shown, and how a run ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launched import TWO_ON_CPU, command, launch, running, wait_gone, write

from lightlite.launch.cli import main

SUM = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print("rank", dist.get_rank(), "sum", total.item(), "args", sys.argv[1:], "name", __name__, flush=True)
dist.destroy_process_group()
"""

ENVIRONMENT = """
import json, os, sys
names = ("LIGHTLITE_ACCELERATOR", "LIGHTLITE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
         "OMP_NUM_THREADS", "MKL_NUM_THREADS")
print(json.dumps({name: os.environ.get(name) for name in names} | {"path": sys.path[0], "file": __file__}))
"""

SPAWNING = """
import multiprocessing, os

class Box:
    def __init__(self, value):
        self.value = value

def put(queue):
    queue.put(Box(os.environ["RANK"]))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=put, args=(queue,))
    child.start()
    print(queue.get().value)
    child.join()
"""

FAULTS = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from torch.utils.data import DataLoader

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        time.sleep(60 if index else 0)
        return index

def fail(how):
    if how == "raise":
        raise ValueError("boom on purpose")
    if how == "raise late":
        dist.destroy_process_group()
        time.sleep(0.4)
        raise ValueError("boom on purpose")
    os.kill(os.getpid(), signal.SIGKILL)

dist.init_process_group("gloo")
batches = iter(DataLoader(Slow(), num_workers=1, prefetch_factor=2))
next(batches)
Path(f"ready-{dist.get_rank()}").write_text(str(os.getpid()))
if dist.get_rank() == int(sys.argv[2]):
    while not all(Path(f"ready-{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    time.sleep(0.5)  # so that the test has seen them too
    fail(sys.argv[1])
dist.all_reduce(torch.ones(1))
"""

FAULTS_WITHOUT_TORCH = """
import os, sys, threading, time
from pathlib import Path
child = os.fork()  # a grandchild of the launcher that hears of nothing
if child:
    Path("ready-" + os.environ["RANK"]).write_text(str(os.getpid()))
if not child or os.environ["RANK"] != sys.argv[2]:
    time.sleep(1000)
while not all(os.path.exists(f"ready-{rank}") for rank in range(2)):
    time.sleep(0.05)
time.sleep(0.5)  # so that the test has seen them too
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "os._exit":
    os._exit(3)
if sys.argv[1] == "raise with a thread left":
    threading.Thread(target=time.sleep, args=(1000,)).start()
raise ValueError("boom on purpose")
"""

HANG = """
import signal, sys, time
from pathlib import Path
import os
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "graceful" in sys.argv:
    def end(number, _):
        Path("ended-" + os.environ["RANK"]).write_text(str(number))
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
child = os.fork()  # a grandchild of the launcher that hears of nothing
if child:
    Path("ready-" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(1000)
"""


def test_ranks_form_a_group_and_only_the_first_shows_its_output() -> None:
    result = launch(*TWO_ON_CPU, write("script.py", SUM), "--lr", "0.1", "$$HOME ${local_rank}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "rank 0 sum 3.0 args ['--lr', '0.1', '$$HOME ${local_rank}'] name __main__\n"
    assert result.stderr == ""


def test_a_module_is_run_as_python_m_would() -> None:
    Path("package").mkdir()
    write("package/__init__.py", "")
    write("package/work.py", ENVIRONMENT)
    result = launch(*TWO_ON_CPU, "-m", "package.work")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["path"] == os.getcwd()
    assert found["file"] == os.path.join(os.getcwd(), "package", "work.py")


@pytest.mark.parametrize("how", [["job.py"], ["-m", "job"]], ids=["script", "module"])
def test_what_a_spawned_child_returns_is_of_the_scripts_own_classes(how: list[str]) -> None:
    write("job.py", SPAWNING)
    done = launch(*TWO_ON_CPU, *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"


def test_ranks_get_their_environment_and_share_the_cores() -> None:
    Path("folder").mkdir()
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.pop("MKL_NUM_THREADS", None)
    result = launch("--devices", "2", "--accelerator", "cpu", write("folder/script.py", ENVIRONMENT))
    found = json.loads(result.stdout)
    threads = str(max(1, len(psutil.Process().cpu_affinity()) // 2)) if sys.platform == "linux" else None
    assert threads is None or found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == threads
    assert found["LIGHTLITE_ACCELERATOR"] == "cpu"
    assert found["LIGHTLITE_DEVICES"] == "0,1"
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("0", "2", "2")
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert found["path"] == os.path.join(os.getcwd(), "folder")


def test_threads_set_by_the_user_are_kept() -> None:
    result = launch(
        *TWO_ON_CPU, write("script.py", "import os; print(os.environ['OMP_NUM_THREADS'])"), OMP_NUM_THREADS="7"
    )
    assert result.stdout == "7\n"


def test_a_program_that_is_not_python_runs_on_every_rank() -> None:
    result = launch(*TWO_ON_CPU, "--tee", "--no-python", "/bin/sh", "-c", "echo rank $RANK of $WORLD_SIZE")
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == ["[rank 0] rank 0 of 2", "[rank 1] rank 1 of 2"]


def test_quiet_shows_nothing_and_the_log_folder_keeps_everything() -> None:
    script = write("script.py", "import os, sys; print('out', os.environ['RANK']); sys.stderr.write('err')")
    result = launch(*TWO_ON_CPU, "--quiet", "--log-dir", "logs", script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert Path("logs/attempt_0/rank_1/stdout.log").read_text() == "out 1\n"
    assert Path("logs/attempt_0/rank_0/stderr.log").read_text() == "err"


def test_dry_run_tells_what_would_run_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    script = write("script.py", "open('it ran', 'w')")
    assert main([*TWO_ON_CPU, "--dry-run", script, "--lr", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "machines: 1; ranks on this one: 2" in text
    assert "local rank 1: cpu device 1" in text
    assert "script.py --lr 0.1" in text
    assert not Path("it ran").exists()


def test_list_names_accelerators_and_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        main(["--list"])
    text = capsys.readouterr().out
    assert exit_request.value.code == 0
    assert any(line.split()[0] == "cpu" and line.endswith("available here") for line in text.splitlines() if line)
    assert any(line.split()[0] == "ddp" for line in text.splitlines() if line)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.py"], "there is no file 'missing.py' in"),
        (["-m", "no_such_package.work"], "there is no such module"),
        (["--no-python", "no-such-program"], "there is no such program"),
        (["--accelerator", "cpuu", "script.py"], "Did you mean 'cpu'?"),
        (["--devices", "0", "--accelerator", "cpu", "script.py"], "0"),
        (["--gpus", "2", "--accelerator", "cpu", "script.py"], "use --devices 2 --accelerator cpu"),
        (["--nnodes", "2", *TWO_ON_CPU, "script.py"], "add --master-addr HOST --node-rank N"),
        (["--nnodes", "2", "--node-rank", "2", "--master-addr", "a", *TWO_ON_CPU, "script.py"], "--node-rank 2 is not"),
        (["--max-restarts", "-1", *TWO_ON_CPU, "script.py"], "must not be negative"),
    ],
)
def test_what_cannot_be_run_is_refused_with_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("script.py", "")
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--devices", "2"], ["--nnodes", "3:2", "script.py"], ["--bogus", "x.py"]])
def test_a_malformed_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        main(arguments)
    assert exit_request.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_more_gpus_than_there_are_says_how_many_and_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["--gpus", "4", write("script.py", "")]) == 2
    told = capsys.readouterr().err
    assert "--gpus 4 asked for 4 GPUs, 0 are visible here; use --devices 4 --accelerator cpu" in told


@pytest.mark.parametrize(
    ("script", "how", "code", "last"),
    [
        (FAULTS, "raise", 1, "ValueError: boom on purpose"),
        (FAULTS, "raise late", 1, "ValueError: boom on purpose"),
        (FAULTS, "kill", 137, "was killed by SIGKILL (signal 9), exit code 137"),
        (FAULTS_WITHOUT_TORCH, "raise with a thread left", 1, "ValueError: boom on purpose"),
        (FAULTS_WITHOUT_TORCH, "exit", 3, "failed with exit code 3"),
        (FAULTS_WITHOUT_TORCH, "os._exit", 3, "failed with exit code 3"),
    ],
)
def test_the_first_rank_to_fail_decides(script: str, how: str, code: int, last: str) -> None:
    with running(script, how, "1") as launcher:
        started = time.monotonic()
        _, stderr = launcher.communicate(timeout=10)
        wait_gone(launcher.tree, 5 - (time.monotonic() - started))
        failed = Path("ready-1").read_text()
    assert launcher.returncode == code
    assert f"rank 1 (host {socket.gethostname()}, pid {failed})" in stderr.splitlines()[0]
    assert last in stderr
    assert "ChildFailedError" not in stderr
    if code == 1:
        assert stderr.splitlines()[-1] == last
        assert "entry.py" not in stderr
        assert "runpy" not in stderr
        assert stderr.count("Traceback") == 1


def test_a_failure_of_rank_0_is_told_once() -> None:
    result = launch(*TWO_ON_CPU, write("script.py", FAULTS_WITHOUT_TORCH), "raise", "0")
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[0].startswith("rank 0 (host ")
    assert lines[0].endswith("failed with exit code 1:")
    assert lines[-1] == "ValueError: boom on purpose"
    assert result.stderr.count("boom on purpose") == 2  # the line of source, and the exception


def test_a_script_that_does_not_compile_is_told_as_python_does() -> None:
    result = launch("--devices", "1", "--accelerator", "cpu", write("script.py", "x = = 1\n"))
    assert result.returncode == 1
    assert 'script.py", line 1' in result.stderr
    assert result.stderr.splitlines()[-1] == "SyntaxError: invalid syntax"


def test_the_users_excepthook_is_called() -> None:
    script = "import sys\nsys.excepthook = lambda *error: print('seen', error[1])\nraise ValueError('boom')\n"
    result = launch("--devices", "1", "--accelerator", "cpu", write("script.py", script))
    assert result.stdout == "seen boom\n"
    assert result.stderr.splitlines()[-1] == "ValueError: boom"


def test_a_failed_run_starts_anew_with_a_fresh_store() -> None:
    script = (
        SUM + "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': sys.exit(5 if os.environ['RANK'] == '1' else 0)\n"
    )
    result = launch(*TWO_ON_CPU, "--max-restarts", "1", write("script.py", script))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rank 0 sum 3.0") == 2
    assert "failed with exit code 5; starting all ranks anew (restarts left: 0)" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_pass_on_to_the_ranks(number: signal.Signals, code: int) -> None:
    with running(HANG, "graceful") as launcher:
        launcher.send_signal(number)
        launcher.communicate(timeout=5)
        wait_gone(launcher.tree, 1)
    assert launcher.returncode == code
    assert [Path(f"ended-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace_time() -> None:
    with running(HANG, "stubborn", options=(*TWO_ON_CPU, "--grace", "1")) as launcher:
        started = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=5)
        assert time.monotonic() - started > 0.9
        wait_gone(launcher.tree, 1)
    assert launcher.returncode == 143


def test_a_second_interrupt_ends_the_ranks_at_once() -> None:
    with running(HANG, "stubborn", options=(*TWO_ON_CPU, "--grace", "30")) as launcher:
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=3)
        wait_gone(launcher.tree, 1)
    assert launcher.returncode == 143


def test_a_killed_launcher_leaves_no_process_and_no_folder() -> None:
    temporary = Path("temporary")
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary.resolve())
    with running(HANG, "stubborn") as launcher:
        assert list(temporary.glob("lightlite-*"))
        launcher.kill()
        launcher.wait(5)
        wait_gone(launcher.tree, 5)
        assert not list(temporary.glob("lightlite-*"))


def test_a_single_machine_listens_on_loopback_only() -> None:
    script = SUM.replace("dist.destroy_process_group()", HANG.replace("child = os.fork()", "child = 1"))
    with running(script) as launcher:
        addresses = [
            connection.laddr.ip
            for process in (psutil.Process(launcher.pid), *launcher.tree)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert addresses
    assert set(addresses) <= {"127.0.0.1", "::1"}


@pytest.mark.skipif(sys.platform != "linux", reason="the test reads the terminal the Linux way")
def test_rank_0_keeps_the_terminal() -> None:
    import pty

    ours, theirs = pty.openpty()
    script = write("script.py", "import sys; print(sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty())")
    subprocess.run(command(*TWO_ON_CPU, script), stdin=theirs, stdout=theirs, stderr=theirs, timeout=60, check=True)
    assert os.read(ours, 1000) == b"True True True\r\n"
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("meeting", ["node rank", "endpoint"])
def test_two_launchers_meet_as_two_machines(meeting: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    write("script.py", SUM if meeting == "node rank" else "import os; print(os.environ['WORLD_SIZE'])")
    processes = []
    for node in ("0", "1"):
        where = ["--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port]
        if meeting == "endpoint":
            where = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
        arguments = command("--nnodes", "2", *where, "--devices", "1", "--accelerator", "cpu", "script.py")
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    shown = "rank 0 sum 3.0 args [] name __main__\n" if meeting == "node rank" else "2\n"
    assert "".join(stdout for stdout, _ in ends) == shown


def test_the_console_script_has_the_launch_command() -> None:
    program = Path(sys.executable).with_name("lightlite")
    result = subprocess.run([program, "launch", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "usage: lightlite launch [options] script.py" in result.stdout
    assert subprocess.run([program, "lunch"], capture_output=True, timeout=60).returncode == 2
