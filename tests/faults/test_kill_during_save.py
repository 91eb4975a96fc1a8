"""A few of the trials of `kill_during_save.py`, which see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("how", [(), ("--asynchronous",)])
def test_a_writer_that_is_killed_leaves_whole_files(how: tuple[str, ...]) -> None:
    program = Path(__file__).with_name("kill_during_save.py")
    command = [sys.executable, str(program), "--trials", "40", "--seed", "1", *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"40 trials, (\d+) of them within a save; wrong: nothing", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 5
