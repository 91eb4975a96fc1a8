"""Runs the fault matrix: `python -m tests.faults.matrix [--way …] [--fault …] [--rank …] [--stage …] [--jobs 2]`.

Every cell is a real script in a subprocess, with a session, a working folder and a temporary folder of its own, and
a variable in its environment by which every process of the run is found, orphans too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from expected import ECHO, FAULTS, RANKS, STAGES, STALLS, WAYS, Cell, all_cells, exit_code, words

SCRIPT = Path(__file__).with_name("script.py")
README = Path(__file__).with_name("README.md")
MARK = "LIGHTLITE_FAULT_RUN"
BOUND = 5.0
"""Seconds from when a fault can be noticed to when no process of the run is left."""

TIMEOUT = 4.0
"""`Trainer(timeout=…)` of the cells with a stall, in seconds. The others have the default, half an hour."""

START_LIMIT, END_LIMIT = 120.0, 30.0
"""Seconds after which a run that does not start, or does not end, is given up."""

SMALL_DISK = 2**20
"""Bytes of the temporary folder in the cells with a full disk."""


@dataclass
class Outcome:
    """How a cell ended.

    Attributes:
        cell: The cell.
        seconds: From when the fault could be noticed to when no process of the run was left; None if some were.
        code: Exit code of the process that was started.
        stdout: All of it.
        stderr: All of it.
        left: What was left, in words.
        problems: What is not as expected; empty for a cell that passes.
    """

    cell: Cell
    seconds: float | None = None
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Run:
    """The processes of one run, and what they hold.

    Args:
        command: Program and arguments.
        folder: Where it works; its output goes to `stdout` and `stderr` there.
        temporary: Its temporary folder.
        largest_file: Limit to the size of its files, in bytes; None for none.
    """

    def __init__(self, command: Sequence[str], folder: Path, temporary: Path, largest_file: int | None = None) -> None:
        self._mark = uuid.uuid4().hex
        self._temporary = temporary
        self._shared_memory = shared_memory()
        self._sockets: set[str] = set()
        # Torch keeps what it compiles in the temporary folder from run to run; that is no leftover of this run.
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        environ = {**os.environ, **compiled, MARK: self._mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        resource.prlimit(self.process.pid, resource.RLIMIT_CORE, (0, 0))
        if largest_file is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def processes(self) -> list[psutil.Process]:
        """The run's processes that live, whoever their parents are."""
        self.process.poll()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def note_sockets(self) -> list[str]:
        """Take down what the run's processes listen on; returns the addresses that are not of this machine alone."""
        held = {inode for process in self.processes() for inode in _socket_inodes(process.pid)}
        listening = {inode: address for inode, address in _listening().items() if inode in held}
        self._sockets |= listening.keys()
        return [address for address in listening.values() if not _is_loopback(address)]

    def wait_for(self, path: Path, limit: float) -> bool:
        """Wait until a file is there, for at most `limit` seconds and not beyond the end of the first process."""
        deadline = time.monotonic() + limit
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def wait_until_dead(self, limit: float) -> bool:
        """Wait until no process is left, for at most `limit` seconds."""
        deadline = time.monotonic() + limit
        # What is on its way out has no environment any more, but only at its end does its parent have the exit code.
        while self.processes() or self.process.poll() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        return True

    def left_behind(self) -> list[str]:
        """Processes, listening sockets and files of the run that are there now and stay there."""
        deadline = time.monotonic() + 2
        while (left := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _leftovers(self) -> list[str]:
        left = [f"process {process.pid}: {_command_of(process)}" for process in self.processes()]
        left += [f"port {address}" for inode, address in _listening().items() if inode in self._sockets]
        left += [f"file {path.name} in the temporary folder" for path in sorted(self._temporary.iterdir())]
        shared = shared_memory() - self._shared_memory
        shared -= shared and _mapped_by_others({process.pid for process in self.processes()})
        return left + [f"file /dev/shm/{name}" for name in sorted(shared)]

    def kill(self) -> None:
        """End whatever is left."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


def shared_memory() -> set[str]:
    """Names of the files in shared memory."""
    return set(os.listdir("/dev/shm"))


def _mapped_by_others(own: set[int]) -> set[str]:
    """Names of the files in shared memory that processes have mapped which are neither of the run nor this one."""
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        if pid not in own and pid != os.getpid():
            with contextlib.suppress(OSError):
                found |= set(re.findall(r"/dev/shm/(\S+)", Path(f"/proc/{pid}/maps").read_text(errors="replace")))
    return found


def _socket_inodes(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if target.startswith("socket:["):
                    yield target[8:-1]


def _listening() -> dict[str, str]:
    """Address, in the kernel's hexadecimal form, by inode of every listening TCP socket of the machine."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    found[fields[9]] = fields[1]
    return found


def _is_loopback(address: str) -> bool:
    host = address.split(":")[0]
    return host in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "(gone meanwhile)"


@contextlib.contextmanager
def temporary_folder(folder: Path, small: bool) -> Iterator[tuple[Path, int | None]]:
    """An empty folder. A small one is a file system of its own, or, for who may not mount one, comes with a limit
    to the size of files that whoever uses it is to have.
    """
    path = folder / "t"
    path.mkdir()
    mounted = small and _mount(path)
    try:
        yield path, SMALL_DISK if small and not mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=30)


def _mount(path: Path) -> bool:
    program = shutil.which("mount")
    if program is None or os.geteuid() != 0:
        return False
    command = [program, "-t", "tmpfs", "-o", f"size={SMALL_DISK},mode=0700", "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def command_of(cell: Cell, folder: Path) -> list[str]:
    """What a user would type."""
    timeout = TIMEOUT if cell.fault in STALLS else 0.0
    launch = ["-m", "lightlite.launch", "--devices", "2", "--accelerator", "cpu"] if cell.way == "command" else []
    arguments = [cell.fault, str(cell.rank), cell.stage, str(folder), str(timeout)]
    return [sys.executable, *launch, str(SCRIPT), *arguments]


def run(cell: Cell, slack: float = 1.0) -> Outcome:
    """Run a cell and compare what happens with what should.

    Args:
        cell: The cell.
        slack: Factor to the bound on the time, for a machine that is busy with other things.
    """
    outcome = Outcome(cell)
    # The path is short because sockets are made beneath it.
    with (
        tempfile.TemporaryDirectory(prefix="faults-", dir="/tmp") as name,
        temporary_folder(Path(name), cell.fault == "disk full") as (temporary, limit),
    ):
        folder = Path(name)
        processes = Run(command_of(cell, folder), folder, temporary, limit)
        try:
            _follow(processes, folder, outcome)
        finally:
            processes.kill()
        outcome.stdout = (folder / "stdout").read_text(errors="replace")
        outcome.stderr = (folder / "stderr").read_text(errors="replace")
    outcome.problems += find_problems(outcome, slack)
    return outcome


def _follow(processes: Run, folder: Path, outcome: Outcome) -> None:
    cell = outcome.cell
    if not all(processes.wait_for(folder / f"ready-{rank}", START_LIMIT) for rank in RANKS):
        outcome.problems.append("the ranks did not come as far as the fault")
        return
    outcome.problems += [f"listens beyond loopback: {address}" for address in processes.note_sockets()]
    (folder / "go").touch()
    patience = TIMEOUT if cell.fault in STALLS else 0.0
    dead = processes.wait_until_dead(patience + END_LIMIT)
    now = time.time()
    if not (folder / "fault").exists():
        outcome.problems.append("the fault did not happen")
    elif dead:
        outcome.seconds = now - float((folder / "fault").read_text()) - patience
    outcome.code = processes.process.poll()
    outcome.left = processes.left_behind()


def find_problems(outcome: Outcome, slack: float) -> list[str]:
    """What is not as expected."""
    cell, problems = outcome.cell, []
    if outcome.code != exit_code(cell):
        problems.append(f"exit code {outcome.code} instead of {exit_code(cell)}")
    if outcome.seconds is not None and outcome.seconds > BOUND * slack and not cell.ends_well:
        problems.append(f"took {outcome.seconds:.1f} s, more than {BOUND * slack:g} s")
    problems += [f"left behind: {thing}" for thing in outcome.left]
    position = 0
    for pattern in words(cell):
        found = re.compile(pattern).search(outcome.stderr, position)
        if found is None:
            problems.append(f"standard error lacks, or has not at its place: {pattern}")
        else:
            position = found.end()
    end = outcome.stderr.rstrip().splitlines()[-1:]
    if end and ECHO.search(end[0]):
        problems.append(f"the last words are an echo: {end[0]}")
    if cell.ends_well != ("finished" in outcome.stdout):
        problems.append("the script did not come to its end" if cell.ends_well else "the script went on")
    return problems


def table(outcomes: Sequence[Outcome]) -> str:
    """Seconds, one row for a way and a fault."""
    by_cell = {outcome.cell: outcome for outcome in outcomes}
    columns = [(rank, stage) for rank in RANKS for stage in STAGES]
    lines = [
        "| way | fault | " + " | ".join(f"{stage}, rank {rank}" for rank, stage in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for way in WAYS:
        for fault in FAULTS:
            cells = [by_cell.get(Cell(way, fault, rank, stage)) for rank, stage in columns]
            if any(cells):
                lines.append(f"| {way} | {fault} | " + " | ".join(_figure(outcome) for outcome in cells) + " |")
    return "\n".join(lines) + "\n"


def _figure(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    figure = "alive" if outcome.seconds is None else f"{outcome.seconds:.1f}"
    figure = f"({figure})" if outcome.cell.ends_well else figure
    return f"**{figure}**" if outcome.problems else figure


def write_readme(outcomes: Sequence[Outcome]) -> None:
    """Put the table in its place in the README."""
    text = README.read_text()
    start, end = "<!-- table -->\n", "<!-- end of table -->"
    before, after = text.split(start)[0], text.split(end)[1]
    README.write_text(f"{before}{start}{table(outcomes)}{end}{after}")


def main() -> int:
    """Run the cells asked for, all by default.

    Returns:
        1 if one of them failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in (("way", WAYS), ("fault", FAULTS), ("rank", RANKS), ("stage", STAGES)):
        parser.add_argument(f"--{name}", choices=choices, type=type(choices[0]), nargs="+", default=choices)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default: 2)")
    parser.add_argument("--slack", type=float, default=1.0, help="factor to the bound on the time (default: 1)")
    parser.add_argument("--output", action="store_true", help="show what the cells that fail have printed")
    parser.add_argument("--write-readme", action="store_true", help="write the table to README.md")
    options = parser.parse_args()
    cells = [
        cell
        for cell in all_cells()
        if cell.way in options.way
        and cell.fault in options.fault
        and cell.rank in options.rank
        and cell.stage in options.stage
    ]
    # A terminal's Ctrl-C ends this program only, which then ends the runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(lambda cell: run(cell, options.slack), cells):
            outcomes.append(outcome)
            tell(outcome, options.output)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    sys.stdout.write(f"\n{table(outcomes)}\n{len(outcomes)} cells in {time.monotonic() - started:.0f} s, ")
    sys.stdout.write(f"{failed} not as expected\n")
    if options.write_readme:
        write_readme(outcomes)
    return 1 if failed else 0


def tell(outcome: Outcome, with_output: bool) -> None:
    """Print a line for a cell, and what is wrong with it."""
    took = "still alive" if outcome.seconds is None else f"{outcome.seconds:5.2f} s"
    lines = [f"{'FAIL' if outcome.problems else 'ok  '} {took}  {outcome.cell}"]
    lines += [f"         {problem}" for problem in outcome.problems]
    if with_output and outcome.problems:
        lines += [f"         | {line}" for line in (outcome.stdout + outcome.stderr).splitlines()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
