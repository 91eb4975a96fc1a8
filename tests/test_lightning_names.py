"""README's table of Lightning's names tells the truth: every name is where it says, under Lightning's own name too."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lightlite as pl
from lightlite import callbacks
from lightlite.errors import MisconfigurationException

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Lightning's names and where they are\n")[2].partition("\n## ")[0]


def rows(header: str) -> Iterator[list[str]]:
    """The cells of one table of the section, by the beginning of its header."""
    table = SECTION.partition(f"\n| {header}")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


MODULES = [(names(theirs), names(ours)[0], names(listed)) for theirs, ours, listed in rows("in `pytorch_lightning`")]
CLASSES = [(names(path)[0], kind, names(listed)) for path, kind, listed in rows("class")]
LEFT_OUT = [name.rpartition(".") for _, listed in rows("left out") for name in names(listed)]


def look_up(path: str) -> Any:
    """The object at a dotted path: a module's, or a class's in a module."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:end]).startswith(error.name or "-"):
                raise
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def test_the_tables_are_there() -> None:
    assert len(MODULES) > 30
    assert len(CLASSES) > 40
    assert len(LEFT_OUT) > 15


@pytest.mark.parametrize(("module", "listed"), [row[1:] for row in MODULES], ids=[row[1] for row in MODULES])
def test_every_name_of_a_module_can_be_imported(module: str, listed: list[str]) -> None:
    namespace = importlib.import_module(module)
    assert [name for name in listed if not hasattr(namespace, name)] == []


INSTANCES: dict[str, Callable[[], Any]] = {
    "lightlite.Trainer": lambda: pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False),
    "lightlite.LightningModule": pl.LightningModule,
    "lightlite.LightningDataModule": pl.LightningDataModule,
    "lightlite.Fabric": lambda: look_up("lightlite.Fabric")(accelerator="cpu"),
    "lightlite.callbacks.ModelCheckpoint": callbacks.ModelCheckpoint,
}


@cache
def attributes(path: str) -> set[str]:
    """Of the class, and of an instance where that has more."""
    return {*dir(look_up(path)), *(dir(INSTANCES[path]()) if path in INSTANCES else ())}


@pytest.mark.parametrize(("path", "kind", "listed"), CLASSES, ids=[f"{path}-{kind}" for path, kind, _ in CLASSES])
def test_every_argument_and_member_of_a_class_is_there(path: str, kind: str, listed: list[str]) -> None:
    there = set(inspect.signature(look_up(path)).parameters) if kind == "arguments" else attributes(path)
    assert [name for name in listed if name not in there] == []


PROGRAM = """
import importlib, json, sys
import lightlite.compat
lightlite.compat.install()
modules, left_out = json.loads(sys.argv[1])
wrong = []
for theirs, ours, listed in modules:
    root = "" if theirs[:1] and theirs[0].startswith("lightning") else "pytorch_lightning"
    module = importlib.import_module(".".join(filter(None, [root, *theirs])))
    try:
        here = importlib.import_module(ours)
    except ImportError as error:
        wrong.append(str(error))
        continue
    wrong += [f"{module.__name__}.{name}" for name in listed if getattr(module, name, 0) is not getattr(here, name, 1)]
print(json.dumps(wrong))
for module, _, name in left_out:
    try:
        exec(f"from pytorch_lightning.{module} import {name}")
    except ImportError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def under_lightnings_name() -> list[str]:
    """What the program prints: names that are not found, and what is said of each that is left out."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([MODULES, LEFT_OUT])], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_under_lightnings_name_the_same_objects_are_found(under_lightnings_name: list[str]) -> None:
    assert json.loads(under_lightnings_name[0]) == []


def test_under_lightnings_name_what_is_left_out_says_so(under_lightnings_name: list[str]) -> None:
    for (module, _, name), message in zip(LEFT_OUT, under_lightnings_name[1:], strict=True):
        assert re.search(rf"no {name if module != 'serve' else 'serve'} in pytorch_lightning", message), message
        assert re.search("left out of lightlite|not in lightlite yet", message), message


@pytest.mark.parametrize(("module", "_", "name"), [one for one in LEFT_OUT if one[0] != "serve"])
def test_what_is_left_out_says_so_where_lightlite_would_have_it(module: str, _: str, name: str) -> None:
    with pytest.raises(
        ImportError, match=f"no {name} in lightlite.{module}: .*(left out of lightlite|not in lightlite yet)"
    ):
        getattr(importlib.import_module(f"lightlite.{module}"), name)


@pytest.mark.parametrize(
    "arguments",
    [{"strategy": "deepspeed"}, {"strategy": "xla"}, {"accelerator": "tpu"}, {"precision": "transformer-engine"}],
)
def test_the_trainer_refuses_what_is_left_out(arguments: dict[str, str]) -> None:
    (given,) = arguments.values()
    with pytest.raises(MisconfigurationException, match=f"'{given}' is left out of lightlite"):
        pl.Trainer(**arguments)  # type: ignore[arg-type]
