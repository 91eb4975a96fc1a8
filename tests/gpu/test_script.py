"""`./scripts/test-gpu` where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REASONS

SCRIPT = Path(__file__).parents[2] / "scripts" / "test-gpu"


@pytest.mark.skipif(None in REASONS.values(), reason="there is a GPU here, which the script would use")
def test_a_machine_without_a_gpu_does_not_pass_for_one_whose_tests_passed() -> None:
    environment = {**os.environ, "LIGHTLITE_PYTHON": sys.executable}
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sees 0 GPUs" in done.stderr
    assert "there is no GPU to test with here" in done.stderr
