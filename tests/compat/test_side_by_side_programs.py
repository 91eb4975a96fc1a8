"""The programs that are compared with Lightning run as they are, under Lightning's names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAMS = sorted(Path(__file__).parents[1].glob("side_by_side/programs/*.py"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each program has left its files, and `told.json` how it ended."""
    folder = tmp_path_factory.mktemp("programs")
    runner = Path(__file__).with_name("run_all.py")
    done = subprocess.run(
        [sys.executable, "-m", "lightlite.launch", "--as-lightning", runner, folder, *PROGRAMS],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_trainer_was_lightlites(ran: Path) -> None:
    assert json.loads((ran / "told.json").read_text())["trainer"] == "lightlite.trainer"
    assert len(PROGRAMS) >= 12


@pytest.mark.parametrize("name", [program.stem for program in PROGRAMS])
def test_a_program_runs_unchanged(ran: Path, name: str) -> None:
    assert json.loads((ran / "told.json").read_text())[name] == ""
    assert torch.load(ran / name / "results.pt", weights_only=False)
