"""Two ranks from wherever Python code runs: no main guard, no importable main module, no main thread is needed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightlite as pl

BESIDE = """
import torch
SCALE = 2
class Base:
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)
"""

NET = """
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()
    def predict_step(self, batch, batch_idx):
        return f"{batch_idx * FACTOR} on {self.global_rank}"
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)
"""

TRAIN = """
trainer = pl.Trainer(devices=2, accelerator="cpu", max_epochs=1, logger=False, barebones=True)
trainer.fit(Net(), DataLoader(torch.ones(8, 4), batch_size=2))
print(trainer.global_step, *trainer.predict(Net(), DataLoader(torch.ones(4, 4), batch_size=2)), sep=", ")
"""

IMPORTS = "print('body')\nimport torch\nimport lightlite as pl\nfrom torch.utils.data import DataLoader\n"
PROGRAM = f"{IMPORTS}FACTOR = 3\n{NET}\n{TRAIN}"
PRINTED = "body\n2, 0 on 0, 3 on 1\n"


def run(*command: str, folder: Path, stdin: str | None = None) -> str:
    """What a Python program prints that ends well."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate(stdin, timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out


@pytest.mark.parametrize("how", ["-c", "-"])
def test_a_program_without_a_file(tmp_path: Path, how: str) -> None:
    if how == "-c":
        assert run("-c", PROGRAM, folder=tmp_path) == PRINTED
    else:
        assert run("-", folder=tmp_path, stdin=PROGRAM) == PRINTED


SCRIPT = f"""
{IMPORTS}
import os
import beside

class Net(beside.Base, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()
    def predict_step(self, batch, batch_idx):
        return f"{{beside.SCALE}} in {{os.getcwd()}} on {{self.global_rank}}"

os.chdir("/")
{TRAIN}
"""


def test_a_script_with_modules_beside_it_that_changes_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text(BESIDE)
    (folder / "train.py").write_text(SCRIPT)
    assert run("scripts/train.py", folder=tmp_path) == "body\n2, 2 in / on 0, 2 in / on 1\n"


def test_a_module_of_a_package_with_a_main_guard_and_imports_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "beside.py").write_text(BESIDE)
    net = NET.replace("        return f", "        from .beside import SCALE as FACTOR\n        return f")
    guarded = f"def main():\n{textwrap.indent(TRAIN, '    ')}\nif __name__ == '__main__':\n    main()\n"
    (folder / "train.py").write_text(f"{IMPORTS}{net}\n{guarded}")
    assert run("-m", "package.train", folder=tmp_path) == "body\n2, 0 on 0, 2 on 1\n"


def test_an_interactive_interpreter(tmp_path: Path) -> None:
    """Typed line by line at a terminal, as a person would; Ctrl-D ends it."""
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-i", "-q"], stdin=its_end, stdout=its_end, stderr=its_end, cwd=tmp_path,
        env={**os.environ, "PYTHON_BASIC_REPL": "1", "TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(its_end)
    try:
        shown = _converse(terminal, f"{PROGRAM}\x04", process)
    finally:
        os.close(terminal)
        process.kill()
        process.wait()
    assert "2, 0 on 0, 3 on 1" in shown, shown
    assert "Error" not in shown


def _converse(terminal: int, typed: str, process: subprocess.Popen[bytes]) -> str:
    """Type at a terminal, a line whenever a prompt shows; all that it showed until the process ended."""
    shown, lines, deadline = "", typed.splitlines(keepends=True), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # Linux's way to say that nobody has the other end open any more
                break
        if lines and shown.endswith((">>> ", "... ")):
            os.write(terminal, lines.pop(0).encode())
    process.wait(10)
    return shown


class Local(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).pow(2).mean()

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.global_rank, threading.current_thread() is threading.main_thread()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_a_test_of_pytest_and_a_thread_that_is_not_the_main_thread() -> None:
    def train() -> list[Any]:
        trainer = pl.Trainer(devices=2, accelerator="cpu", max_epochs=1, logger=False, barebones=True)
        trainer.fit(Local(), DataLoader(torch.ones(8, 4), batch_size=2))
        predictions: list[Any] = trainer.predict(Local(), DataLoader(torch.ones(4, 4), batch_size=2))
        return predictions

    assert train() == [(0, True), (1, True)]
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train()))
    thread.start()
    thread.join()
    assert results == [[(0, False), (1, True)]]
