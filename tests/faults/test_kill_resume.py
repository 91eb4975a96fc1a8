"""A few of the trials of `kill_resume.py`, which see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened() -> None:
    program = Path(__file__).with_name("kill_resume.py")
    command = [sys.executable, str(program), "--trials", "3", "--seed", "2", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.search(r"3 trials, (\d+) kills", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 1, done.stdout
    differing = re.findall(r"differs in (.*)", done.stdout)
    assert all(what.startswith("names of the best") and not what.endswith("end") for what in differing), done.stdout
