"""Callbacks that installed packages declare under `lightlite.callbacks_factory`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = """
from lightlite.callbacks import Callback, ModelCheckpoint

class Greeter(Callback):
    def on_fit_start(self, trainer, pl_module):
        print(f"hello from rank {trainer.global_rank}", flush=True)

def one():
    return Greeter()

def several():
    return [Callback(), ModelCheckpoint(monitor="loss")]

def wrong():
    return "a callback"
"""

PROGRAM = """
import json, sys
import torch
import lightlite as pl

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def trainer():
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[pl.callbacks.Timer()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )

first, second = trainer(), trainer()
first.fit(Net(), [torch.ones(1, 1)])
print(json.dumps([type(callback).__name__ for callback in first.callbacks]))
print(json.dumps(first.callbacks[1] is second.callbacks[1]))
"""


def run(tmp_path: Path, entry_points: str) -> subprocess.CompletedProcess[str]:
    """The program, with a package installed that has these entry points."""
    (tmp_path / "greetings.py").write_text(PACKAGE)
    folder = tmp_path / "greetings-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: greetings\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[lightlite.callbacks_factory]\n{entry_points}")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_trainer_gets_what_the_functions_return_after_its_own_callbacks(tmp_path: Path) -> None:
    done = run(tmp_path, "greet = greetings:one\nmore = greetings:several\n")
    assert done.returncode == 0, done.stderr
    greeting, callbacks, shared = done.stdout.splitlines()
    assert greeting == "hello from rank 0"
    assert json.loads(callbacks) == ["Timer", "Greeter", "Callback", "ModelCheckpoint"]
    assert json.loads(shared) is False


def test_a_function_that_returns_something_else_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "odd = greetings:wrong\n")
    assert done.returncode == 1
    assert "what greetings:wrong returns (entry point 'odd' of lightlite.callbacks_factory)='a callback'" in done.stderr
    assert "give an instance of lightlite's Callback, a list of them" in done.stderr
