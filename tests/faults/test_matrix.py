"""The small version of the fault matrix, and that its instruments see what they are to see."""

from __future__ import annotations

import mmap
import os
import socket
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
from expected import FAULTS, RANKS, STAGES, WAYS, Cell, all_cells
from matrix import Outcome, Run, find_problems, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and sockets are looked up the Linux way")

SLACK = 3.0
"""The suite runs beside other tests; the bound itself is for the whole matrix, measured on its own."""

CELLS = (
    Cell("script", "raise", 1, "fit"),
    Cell("command", "sys.exit", 0, "validate"),
    Cell("script", "os._exit", 1, "predict"),
    Cell("command", "SIGKILL", 1, "validate"),
    Cell("script", "SIGSEGV", 0, "fit"),
    Cell("script", "SIGSTOP", 0, "validate"),
    Cell("command", "hang", 1, "fit"),
    Cell("script", "hang in a collective", 1, "predict"),
    Cell("command", "loader worker", 0, "fit"),
    Cell("command", "unpicklable", 1, "predict"),
    Cell("script", "disk full", 0, "predict"),
)

LITTER = """
import os, socket, subprocess, sys, time

listener = socket.create_server(("0.0.0.0", 0))
subprocess.Popen(["sleep", "1000"], start_new_session=True, pass_fds=[listener.fileno()])
for path in (os.path.join(os.environ["TMPDIR"], "litter"), sys.argv[1], "ready"):
    with open(path, "w") as file:
        file.write("litter")
while not os.path.exists("go"):
    time.sleep(0.01)
"""


def test_the_matrix_is_complete_and_the_cells_of_the_suite_have_every_fault_way_rank_and_stage() -> None:
    cells = list(all_cells())
    assert len(cells) == len(set(cells)) == 2 * 11 * 2 * 3
    assert set(CELLS) <= set(cells)
    assert {cell.fault for cell in CELLS} == set(FAULTS)
    assert {(cell.way, cell.stage) for cell in CELLS} == {(way, stage) for way in WAYS for stage in STAGES}
    assert {(cell.way, cell.rank) for cell in CELLS} == {(way, rank) for way in WAYS for rank in RANKS}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_fault_ends_the_run_soon_tells_its_cause_last_and_leaves_nothing(cell: Cell) -> None:
    outcome = run(cell, slack=SLACK)
    assert outcome.problems == [], f"{outcome.problems}\n{outcome.stdout}\n{outcome.stderr}"


def test_processes_ports_and_files_that_are_left_are_found(tmp_path: Path) -> None:
    temporary, shared = tmp_path / "t", Path("/dev/shm", f"litter-{uuid.uuid4().hex}")
    temporary.mkdir()
    litter = Run([sys.executable, "-c", textwrap.dedent(LITTER), str(shared)], tmp_path, temporary)
    try:
        assert litter.wait_for(tmp_path / "ready", 60)
        (address,) = litter.note_sockets()
        assert address.startswith("00000000:")
        (tmp_path / "go").touch()
        assert litter.process.wait(60) == 0
        with open(shared, "r+b") as file:
            ours = mmap.mmap(file.fileno(), 0)  # so that no other test of this time takes the file for its own
        (orphan,) = litter.processes()
        assert not litter.wait_until_dead(0.2)
        left = [f"process {orphan.pid}: sleep 1000", f"port {address}", "file litter in the temporary folder"]
        assert litter.left_behind() == [*left, f"file {shared}"]
        litter.kill()
        assert litter.wait_until_dead(10)
        assert litter.left_behind() == ["file litter in the temporary folder", f"file {shared}"]
        ours.close()
    finally:
        litter.kill()
        shared.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"code": 3}, "exit code 3 instead of 1"),
        ({"seconds": 5.5}, "took 5.5 s, more than 5 s"),
        ({"left": ["process 5: sleep 1000"]}, "left behind: process 5: sleep 1000"),
        ({"stdout": "finished\n"}, "the script went on"),
        ({"stderr": "{told}RuntimeError: Connection closed by peer\n"}, "the last words are an echo: RuntimeError"),
        ({"stderr": "ValueError: boom on rank 1\n"}, "standard error lacks, or has not at its place: rank 1"),
    ],
    ids=["nothing", "exit code", "time", "process", "went on", "echo", "headline"],
)
def test_what_is_not_as_it_should_be_is_told(change: dict[str, object], problem: str | None) -> None:
    host = socket.gethostname()
    told = (
        f"rank 1 (host {host}, pid {os.getpid()}) failed with exit code 1:\n  in commit\nValueError: boom on rank 1\n"
    )
    outcome = Outcome(Cell("command", "raise", 1, "fit"), seconds=1.0, code=1, stderr=told)
    for name, value in change.items():
        setattr(outcome, name, value.format(told=told) if isinstance(value, str) else value)
    problems = find_problems(outcome, slack=1.0)
    assert (problems == []) if problem is None else any(found.startswith(problem) for found in problems)
