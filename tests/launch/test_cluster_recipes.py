"""The recipes in `scripts/cluster/`: they parse, and ask the command line for what it has."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lightlite.launch.cli import build_parser

RECIPES = Path(__file__).parents[2] / "scripts" / "cluster"
VALUES = {"SLURM_NNODES": "4", "RANK": "1", "JOB_COMPLETION_INDEX": "1", "MASTER_PORT": "29400", "port": "29400"}


def commands(file: Path) -> list[list[str]]:
    """What stands between `-m lightlite.launch` and the script's name, each time, with numbers for variables."""
    text = re.sub(r"\\\n", " ", file.read_text())
    found = re.findall(r"python -m lightlite\.launch (.*?train\.py)", text, re.DOTALL)
    return [shlex.split(re.sub(r"\$(\w+)", lambda name: VALUES.get(name[1], "host0"), command)) for command in found]


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.sh")), ids=lambda file: file.name)
def test_shell_recipes_parse(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_kubernetes_recipes_parse(file: Path) -> None:
    yaml = pytest.importorskip("yaml")
    kinds = [document["kind"] for document in yaml.safe_load_all(file.read_text())]
    assert kinds in (["PyTorchJob"], ["Service", "Job"])


@pytest.mark.parametrize("name", ["slurm_launch.sh", "kubernetes_pytorchjob.yaml", "kubernetes_job.yaml"])
def test_recipes_use_options_that_there_are(name: str) -> None:
    (command,) = commands(RECIPES / name)
    options = build_parser().parse_args(command)
    assert options.script == "train.py"
    assert options.gpus == "8"
    assert options.nnodes in ((2, 2), (2, 4))


def test_the_recipes_page_names_every_recipe_and_options_that_there_are() -> None:
    page = (RECIPES / "README.md").read_text()
    for file in RECIPES.iterdir():
        assert file.name == "README.md" or f"`{file.name}`" in page
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= known
