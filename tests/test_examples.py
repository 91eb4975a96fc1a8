"""The examples run on one device and on two, from the script and by the launcher."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"
LAUNCH = ["-m", "lightlite.launch", "--devices", "2", "--accelerator", "cpu"]


def run(*arguments: str) -> str:
    """What Python prints when called so, once it has ended well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def digits(*before: str, devices: int | None = None, epochs: int = 1, more: tuple[str, ...] = ()) -> str:
    chosen = [] if devices is None else ["--accelerator", "cpu", "--devices", str(devices)]
    return run(*before, str(EXAMPLES / "digits.py"), *chosen, "--epochs", str(epochs), "--root-dir", "logs", *more)


def table(printed: str) -> dict[str, str]:
    """The lines of the table that `digits.py` ends with."""
    return dict(re.findall(r"^(accuracy|checkpoint|logs|devices|time) +(.+)$", printed, re.MULTILINE))


def curve(folder: str) -> list[tuple[int, float]]:
    """The training loss by step, as it was logged."""
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]), float(row["train_loss_step"])) for row in rows if row["train_loss_step"]]


def test_digits_reaches_its_accuracy_on_one_device() -> None:
    printed = digits(devices=1, epochs=20)
    rows = table(printed)
    assert float(rows["accuracy"].partition("%")[0]) >= 97
    assert "of 360 test images" in rows["accuracy"]
    assert Path(rows["checkpoint"]).is_file()
    assert (Path(rows["logs"]) / "metrics.csv").is_file()
    assert rows["devices"] == "1 x cpu"


@pytest.mark.parametrize("before", [(), tuple(LAUNCH)], ids=["in the script", "by the launcher"])
def test_digits_on_two_devices_prints_its_last_line_once(before: tuple[str, ...]) -> None:
    printed = digits(*before, devices=None if before else 2)
    assert len(re.findall(r"^time ", printed, re.MULTILINE)) == 1
    assert printed.count("validation accuracy") == 1
    assert table(printed)["devices"] == "2 x cpu"


def test_digits_without_dropout_has_one_loss_curve_on_one_device_and_on_two() -> None:
    curves, accuracies = [], []
    for devices in (1, 2):
        rows = table(digits(devices=devices, epochs=3, more=("--dropout", "0")))
        curves.append(curve(rows["logs"]))
        accuracies.append(rows["accuracy"])
    steps, losses = zip(*curves[0], strict=True)
    other_steps, other_losses = zip(*curves[1], strict=True)
    assert len(steps) >= 10
    assert other_steps == steps
    assert other_losses == pytest.approx(losses, abs=1e-4)
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("devices", [1, 2])
def test_charlm_learns_and_writes_a_sample(devices: int) -> None:
    size = ("--steps", "24", "--batch-size", "16", "--characters", "200000", "--root-dir", "logs")
    printed = run(str(EXAMPLES / "charlm.py"), "--accelerator", "cpu", "--devices", str(devices), *size)
    bits = [float(value) for value in re.findall(r"([\d.]+) bits per character$", printed, re.MULTILINE)]
    assert len(bits) == 8
    assert bits[-1] < bits[0] < 7
    for prompt in ("import ", "def read_", "class "):
        assert len(re.findall(rf"^{prompt}", printed, re.MULTILINE)) >= 1
    assert len(re.findall(r"^[\d,]+ parameters, .* on \d x cpu$", printed, re.MULTILINE)) == 1
