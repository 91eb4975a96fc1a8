"""A few of the trials of `kill_resume.py`, which see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("moments", [("--trials", "2", "--seed", "2"), ("--operations", "17")])
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(moments: tuple[str, ...]) -> None:
    program = Path(__file__).with_name("kill_resume.py")
    command = [sys.executable, str(program), "--workers", "2", *moments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"trials, (\d+) kills, 0 with differences", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 1, done.stdout
