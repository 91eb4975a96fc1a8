"""The benchmark programs run, in a small way. What they measure is noisy, and asserted nowhere in the suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = {
    "checkpoint": ["--megabytes", "1", "--rivals"],
    "overhead": ["--only", "validate", "--steps", "20", "--warmup", "0"],
    "predict": ["--rows", "1000", "--devices", "2"],
    "scaling": ["--model", "mlp", "--devices", "1", "--steps", "2", "--warmup", "1", "--accelerator", "cpu"],
}


def run(name: str, *arguments: Any, where: Path) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_prints_a_table_and_keeps_its_figures(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    printed = run(name, *PROGRAMS[name], "--rounds", 1, "--json", out, "--plot", plot, where=tmp_path)

    kept = json.loads(out.read_text())
    assert "lightlite" in printed
    assert kept["machine"]["packages"]["torch"]
    assert kept["settings"]["rounds"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_every_program_says_how_it_is_used(tmp_path: Path) -> None:
    programs = {path.stem for path in FOLDER.glob("*.py")} - {"measuring"}
    assert programs == {*PROGRAMS, "startup"}
    assert "--devices" in run("startup", "--help", where=tmp_path)


def test_a_bar_that_does_not_hold_is_the_exit_code(tmp_path: Path) -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        from measuring import Bar, Row, print_bars
    finally:
        sys.path.remove(str(FOLDER))

    assert Row.of([3.0, 1.0, 2.0], [4.0]) == Row(1.0, 2.0, 3.0, 0.5)
    assert print_bars([Bar("slow", 1.0, 1.1)])
    assert not print_bars([Bar("slow", 1.2, 1.1), Bar("fast", 1.0, 1.1)])
    assert not Bar("throughput", 0.97, 0.98, at_least=True).holds
