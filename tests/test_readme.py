"""README.md tells the truth: its snippets run, its commands and files exist."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import metadata
from pathlib import Path

import pytest

import lightlite as pl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()


@dataclass(frozen=True)
class Block:
    """A fenced block of the README: its section, its first line's number, its language, and whether it is to be run."""

    section: str
    line: int
    language: str
    runs: bool
    text: str


def blocks() -> list[Block]:
    found, section, start, fence = [], "", 0, ""
    for number, line in enumerate(LINES, 1):
        if line.startswith("```") and not fence:
            start, fence = number + 1, line[3:] or "text"
        elif line.startswith("```"):
            runs = "not run" not in LINES[start - 3]
            found.append(Block(section, start, fence, runs, "\n".join(LINES[start - 1 : number - 1])))
            fence = ""
        elif line.startswith("## ") and not fence:
            section = line[3:]
    return found


PYTHON = [block for block in blocks() if block.language == "python"]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks()
    if block.language == "bash"
    for line in block.text.splitlines()
    if line
]


@cache
def run(*command: str) -> str:
    """What a command prints, once it has ended well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("section", dict.fromkeys(block.section for block in PYTHON if block.runs))
def test_snippets_of_a_section_run_in_order_as_one_program(section: str, tmp_path: Path) -> None:
    """They are put at the lines that they have in the README, so that a traceback tells the place there."""
    lines = [""] * len(LINES)
    for block in PYTHON:
        if block.section == section and block.runs:
            part = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(part)] = part
    program = tmp_path / "README.py"
    program.write_text("\n".join(lines), encoding="utf-8")
    printed = run(sys.executable, str(program))
    if section == "Launching":
        slopes = re.findall(r"slope (\S+), on 2 ranks", printed)
        assert len(slopes) == 1
        assert float(slopes[0]) == pytest.approx(3, abs=0.1)


def test_the_model_in_25_lines_has_25_lines() -> None:
    block = next(block for block in PYTHON if block.section == "A model in 25 lines")
    assert len([line for line in block.text.splitlines() if line]) <= 25


def test_snippets_that_are_not_run_name_arguments_of_the_trainer() -> None:
    known = inspect.signature(pl.Trainer).parameters
    skipped = [block for block in PYTHON if not block.runs]
    assert skipped
    for block in skipped:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pl.Trainer":
                assert {keyword.arg for keyword in node.keywords} <= set(known)


def test_scripts_that_commands_name_exist() -> None:
    own = [word for command in COMMANDS for word in command if "scripts/" in word]
    assert own
    for name in own:
        assert (ROOT / name).is_file(), name
        assert not name.startswith("./") or os.access(ROOT / name, os.X_OK), name


def test_options_of_the_launcher_and_the_examples_exist() -> None:
    launcher = run(sys.executable, "-m", "lightlite.launch", "--help")
    checked = 0
    for command in COMMANDS:
        if command[:3] == ["python", "-m", "lightlite.launch"]:
            script = next((i for i, word in enumerate(command) if word.endswith(".py")), len(command))
            options, rest = command[3:script], command[script:]
        elif command[0] == "python":
            options, rest = [], command[1:]
        else:
            continue
        for option in (word for word in options if word.startswith("--")):
            assert re.search(rf"{option}\b", launcher), option
        if rest and rest[0].startswith("scripts/"):
            told = run(sys.executable, str(ROOT / rest[0]), "--help")
            for option in (word for word in rest if word.startswith("--")):
                assert re.search(rf"{option}\b", told), f"{rest[0]} {option}"
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("option", ["--list", "--dry-run"])
def test_commands_that_only_tell_something_run(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = next(command for command in COMMANDS if option in command)
    assert run(sys.executable, *command[1:]).strip()


def test_extras_that_are_installed_are_declared() -> None:
    declared = metadata("lightlite").get_all("Provides-Extra") or []
    named = [extra for command in COMMANDS for word in command for extra in re.findall(r"^\.\[(\w+)\]$", word)]
    assert named
    assert set(named) <= set(declared)


def test_the_walk_of_one_batch_names_what_there_is() -> None:
    text = next(block.text for block in blocks() if block.section == "The walk of one batch")
    steps = [line.split()[:2] for line in text.splitlines()]
    assert steps[0] == ["Trainer.fit", "lightlite/trainer.py"]
    for name, path in steps:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", source, re.MULTILINE), f"{name} in {path}"


def test_paths_in_the_text_exist() -> None:
    named = re.findall(r"`((?:lightlite|plugins|launch|tests|benchmarks|scripts)/[\w./]*)`", README)
    named += re.findall(r"\]\(([^):#]+)\)", README)
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path
