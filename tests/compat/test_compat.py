"""Lightning's names mean lightlite where `--as-lightning` or `install()` say so: in real programs, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

PROGRAM = Path(__file__).with_name("program.py")
AS_LIGHTNING = [sys.executable, "-m", "lightlite.launch", "--as-lightning"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, code: int = 0) -> str:
    """What a command prints, with its errors where it is to fail."""
    done = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def installed(program: str) -> str:
    """What a program prints in a process in which `install()` was called."""
    return run(sys.executable, "-c", f"import lightlite.compat\nlightlite.compat.install()\n{program}")


def check(printed: str, world_size: int) -> None:
    facts = json.loads(printed.splitlines()[-1])
    assert facts == {
        "world_size": world_size,
        "right": 1.0,
        "file": f"epoch=0-step={4 // world_size}.ckpt",
        "defined_in": ["lightlite.trainer", "lightlite.callbacks.early_stopping", "lightlite.errors"],
        "same": True,
    }


@pytest.mark.parametrize(
    ("options", "devices", "start_method"),
    [
        ([], 1, "spawn"),
        ([], 2, "fork"),
        (["--devices", "2", "--accelerator", "cpu"], 2, None),
    ],
    ids=["alone-with-spawned-worker", "helper-rank-with-forked-workers", "launched-ranks"],
)
def test_a_program_runs_unchanged(options: list[str], devices: int, start_method: str | None) -> None:
    more = [start_method] if start_method else []
    check(run(*AS_LIGHTNING, *options, PROGRAM, str(devices), *more), devices)


def test_a_notebook_installs_it_in_its_first_cell(tmp_path: Path) -> None:
    program = PROGRAM.read_text().partition("if __name__")[0]
    cells = ["import lightlite.compat\nlightlite.compat.install()", program, "main(2, None)"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))  # type: ignore[no-untyped-call]
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[-1].outputs
    check("".join(output.text for output in outputs if output.get("name") == "stdout"), 2)


def test_a_module_and_its_arguments_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text("import sys, lightning\nprint(lightning, sys.argv[1:])\n")
    monkeypatch.chdir(tmp_path)
    assert run(*AS_LIGHTNING, "-m", "job", "--lr", "1") == "<module 'lightning' (lightlite.compat)> ['--lr', '1']\n"
    told = run(*AS_LIGHTNING, "--dry-run", "-m", "job")
    assert f"command: {sys.executable} -m job\n" in told
    assert "PYTHONPATH=" in told


def test_the_scripts_exit_code_and_traceback_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("import pytorch_lightning as pl\npl.Traner()\n")
    told = run(*AS_LIGHTNING, tmp_path / "fail.py", code=1)
    assert "in <module>\n    pl.Traner()" in told
    assert "AttributeError: lightlite has no Traner in pytorch_lightning; did you mean Trainer" in told


def test_without_being_asked_nothing_is_changed() -> None:
    program = "import sys, lightlite\nprint([type(finder).__module__ for finder in sys.meta_path], sys.path)"
    assert "lightlite" not in run(sys.executable, "-I", "-c", program).replace("__editable___lightlite", "")


MISSING = {
    "from pytorch_lightning.callbacks import EarlyStoping": (
        "ImportError: lightlite has no EarlyStoping in pytorch_lightning.callbacks; did you mean EarlyStopping"
    ),
    "pl.callbacks.EarlyStoping": (
        "AttributeError: lightlite has no EarlyStoping in pytorch_lightning.callbacks; did you mean EarlyStopping"
    ),
    "import lightning.app": "ImportError: lightlite has no app in lightning; there is: Callback, Fabric, ",
    "import lightning.pytorch.loops.fit_loop": "ImportError: lightlite has no loops in lightning.pytorch; ",
    "from lightning.pytorch.strategies import DeepSpeedStrategy": (
        "ImportError: lightlite has no DeepSpeedStrategy in lightning.pytorch.strategies (DeepSpeed is left out of "
        "lightlite); "
    ),
    "from lightning.fabric.strategies import XLAStrategy": (
        "ImportError: lightlite has no XLAStrategy in lightning.fabric.strategies (TPUs and XLA are left out of "
        "lightlite); "
    ),
}


def test_a_missing_name_is_told_with_what_there_is() -> None:
    program = f"""
import pytorch_lightning as pl
for statement in {list(MISSING)!r}:
    try:
        exec(statement)
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
"""
    told = installed(program).splitlines()
    for message, line in zip(MISSING.values(), told, strict=True):
        assert line.startswith(message)
        assert "there is: " in line


def test_modules_look_and_behave_like_modules() -> None:
    program = """
import copy, importlib, importlib.util, inspect, pkgutil, sys
import cloudpickle
import pytorch_lightning as pl
import lightning.pytorch.callbacks
from pytorch_lightning.callbacks import *
import lightlite
lightlite.compat.install()
assert repr(pl.callbacks) == "<module 'pytorch_lightning.callbacks' (lightlite.compat)>", pl.callbacks
assert EarlyStopping is lightlite.callbacks.EarlyStopping is lightning.pytorch.callbacks.EarlyStopping
assert lightning.fabric.Fabric is lightning.Fabric is lightlite.Fabric
assert pl.__version__ >= "2.0" and tuple(map(int, pl.__version__.split(".")[:2])) == (2, 6)
assert {"Trainer", "callbacks", "loggers"} <= set(dir(pl)), dir(pl)
assert "Trainer" in pl.__all__ and "callbacks" not in pl.__all__
assert cloudpickle.loads(cloudpickle.dumps(pl)) is pl
assert importlib.reload(pl) is pl and pl.Trainer is lightlite.Trainer
assert importlib.util.find_spec("lightning") is not None
assert not hasattr(pl, "__file__") and not hasattr(pl, "no_such_name")
assert inspect.getmodule(pl.Trainer) is sys.modules["lightlite.trainer"]
import torchmetrics, lightning_utilities
assert "site-packages" in lightning_utilities.__file__
print("well")
"""
    assert installed(program) == "well\n"


def test_the_real_package_already_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "lightning.py").write_text("")
    told = run(
        sys.executable,
        "-c",
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport lightning, lightlite.compat\n"
        "lightlite.compat.install()",
        code=1,
    )
    assert f"the real lightning is imported already, from {tmp_path / 'lightning.py'}" in told
    assert "call lightlite.compat.install() before the first import of it" in told


def test_the_table_names_modules_that_exist() -> None:
    """Every module of Lightning's that the table lists can be imported, and something is in it."""
    program = """
import importlib, json
from lightlite.compat.names import TREES
empty = {}
for root, tree in TREES.items():
    for place in ("", *sorted(tree.modules)):
        module = importlib.import_module(f"{root}.{place}" if place else root)
        empty[module.__name__] = not module.__all__
print(json.dumps([name for name, is_empty in empty.items() if is_empty]))
"""
    facts: Any = json.loads(installed(program))
    assert facts == []
