"""One of the trials of `preempt.py`, which see, for each way to start ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("launcher", ["script", "cli"])
def test_a_run_that_is_told_to_end_saves_once_and_goes_on_from_there(launcher: str) -> None:
    program = Path(__file__).with_name("preempt.py")
    command = [sys.executable, str(program), "--trials", "1", "--seed", "4", "--launcher", launcher]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 trials, 0 not as they should be" in done.stdout
