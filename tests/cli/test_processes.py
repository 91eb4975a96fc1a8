"""Programs with a command line: as a script, on two ranks started either way, and without jsonargparse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

PROGRAM = """
import torch
import lightlite as pl
from lightlite.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

class CommandNet(pl.LightningModule):
    def __init__(self, activation: nn.Module, scale: float = 1.0, size: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.layer, self.activation, self.scale = nn.Linear(size, 1), activation, scale

    def training_step(self, batch, batch_idx):
        return self.scale * self.activation(self.layer(batch)).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.arange(1.0, 9.0).reshape(8, 1), batch_size=4 // self.trainer.world_size)

class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("trainer.max_epochs", "model.size", compute_fn=lambda epochs: 1)

    def after_fit(self):
        print("weight", self.trainer.world_size, repr(self.model.layer.weight.item()), flush=True)

CLI(CommandNet)
"""
WORDS = [
    "fit", "--model.activation=Tanh", "--model.scale=0.5", "--optimizer=SGD", "--optimizer.lr=0.5",
    "--trainer.accelerator=cpu", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs",
    "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1",
]  # fmt: skip


def python(*words: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def weight_of_a_plain_loop() -> float:
    torch.manual_seed(0)
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for batch in torch.arange(1.0, 9.0).reshape(2, 4, 1):
        optimizer.zero_grad()
        (0.5 * layer(batch).tanh().square().mean()).backward()
        optimizer.step()
    return layer.weight.item()


@pytest.fixture
def program() -> str:
    Path("main.py").write_text(PROGRAM)
    return "main.py"


def test_two_ranks_train_what_the_words_describe_however_they_were_started(program: str) -> None:
    launched = ["-m", "lightlite.launch", "--accelerator", "cpu", "--devices", "2", program, *WORDS]
    runs = ([program, *WORDS, "--trainer.devices=2"], launched)
    said = [[line for line in python(*run).stdout.splitlines() if line.startswith("weight 2")] for run in runs]
    assert all(said)
    weights = [float(line.split()[2]) for lines in said for line in lines]
    assert weights == pytest.approx([weight_of_a_plain_loop()] * len(weights), rel=1e-5)
    folders = sorted(Path("logs/lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    for folder in folders:
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == {
            "activation": {"class_path": "torch.nn.Tanh"},
            "scale": 0.5,
        }
        checkpoint = torch.load(next(folder.glob("checkpoints/*.ckpt")), weights_only=True)
        assert checkpoint["hyper_parameters"]["activation"]["class_path"] == "torch.nn.Tanh"


def test_a_configuration_that_is_there_already_ends_the_run_on_every_rank(program: str) -> None:
    Path("config.yaml").write_text("old: true\n")
    words = [*WORDS, "--trainer.logger=false", "--trainer.devices=2", "--trainer.enable_checkpointing=false"]
    assert "config.yaml is there already" in python(program, *words, expected=1).stderr.splitlines()[-1]
    assert Path("config.yaml").read_text() == "old: true\n"


@pytest.mark.parametrize("lacking", ["jsonargparse", "docstring_parser"])
def test_without_jsonargparse_the_pip_line_is_told(lacking: str) -> None:
    said = python("-c", f"import sys; sys.modules['{lacking}'] = None; import lightlite.cli", expected=1).stderr
    assert said.splitlines()[-1] == (
        f"ModuleNotFoundError: lightlite.cli needs jsonargparse[signatures]>=4.53, but {lacking} is not installed: "
        'pip install "jsonargparse[signatures]>=4.53"'
    )


def test_jsonargparse_is_imported_with_the_command_line_only() -> None:
    python("-c", "import sys, lightlite, lightlite.restore; sys.exit('jsonargparse' in sys.modules)")
