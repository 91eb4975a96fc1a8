from __future__ import annotations

import os
import pickle
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightlite.callbacks import ModelSummary, RichModelSummary, RichProgressBar
from lightlite.callbacks.progress.rich_progress import RichProgressBarTheme
from lightlite.errors import MisconfigurationException

from .programs import Net, fit, loader, trainer

PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from callbacks.programs import Net, loader, trainer
from lightlite.callbacks import RichModelSummary, RichProgressBar
from rich.progress import TextColumn

class Bar(RichProgressBar):
    def configure_columns(self, trainer):
        return [*super().configure_columns(trainer), TextColumn("own column")]

class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        if batch_idx == 12:
            print("from a step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.02)

bar = Bar()
run = trainer(bar, RichModelSummary(), max_epochs=2, enable_progress_bar=True, enable_model_summary=True,
              num_sanity_val_steps=6)
assert run.progress_bar_callback is bar
run.fit(Slow(), loader(20), loader(15))
bar.print("between")
run.test(Slow(), loader(4), verbose=False)
assert bar.progress is None
"""


def in_a_terminal() -> str:
    """What the program writes to a terminal of 120 columns."""
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def on_screen(written: str) -> list[str]:
    """The lines that stay on the screen."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line.strip() for line in lines if line.strip()]


def test_in_a_terminal_bars_and_a_summary_are_drawn() -> None:
    written = in_a_terminal()
    stays = on_screen(written)
    assert re.fullmatch(r"│ 0 │ layer │ Linear │ +5 │ train │", stays[3])
    assert stays[5:7] == ["Trainable params: 5", "Non-trainable params: 0"]
    epoch = next(line for line in stays if line.startswith("Epoch"))
    assert re.fullmatch(
        r"Epoch 1/1 ━+ 20/20 0:00:0\d • 0:00:00 \d+\.\d\dit/s own column train_loss: -?\d+\.\d{3}", epoch
    )
    assert [line for line in stays if line in ("between", "from a step")] == ["from a step", "from a step", "between"]
    assert re.fullmatch(r"Testing ━+ 4/4 .* own column", stays[-1])
    assert "Validation" not in "".join(stays)
    assert "Sanity Checking" not in "".join(stays)
    assert "Sanity Checking" in written
    assert 2 <= written.count("Validation") <= 60
    assert 6 <= written.count("Epoch 0/1") <= 60


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    theme = RichProgressBarTheme(metrics_format=".2e")
    run = fit(RichProgressBar(theme=theme), enable_progress_bar=True, max_epochs=2)
    run.predict(Net(), loader(3))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Epoch 1/1: 4/4, 0:00:00, \d+\.\d\dit/s, train_loss=\d\.\d\de-\d\d", lines[-2])
    assert re.fullmatch(r"Predicting: 3/3, 0:00:00, \d+\.\d\dit/s", lines[-1])


def on_a_console_of_its_own(bar: dict[str, Any]) -> str:
    """What a fit over two epochs writes to a file that passes for a terminal of 90 columns."""
    import rich

    with open("screen", "w", encoding="utf-8") as screen:
        options = {"file": screen, "force_terminal": True, "width": 90}
        try:
            fit(RichProgressBar(**bar, console_kwargs=options), enable_progress_bar=True, max_epochs=2)
        finally:
            rich.reconfigure()
    return Path("screen").read_bytes().decode()


def test_its_console_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    stays = on_screen(on_a_console_of_its_own({}))
    assert capsys.readouterr().out == ""
    assert len(stays) == 1
    assert re.match(r"Epoch 1/1 ━+ 4/4", stays[0])


def test_each_epochs_bar_stays_where_asked_for() -> None:
    stays = on_screen(on_a_console_of_its_own({"leave": True}))
    assert [line.split(" ━")[0] for line in stays] == ["Epoch 0/1", "Epoch 1/1"]


def test_a_rate_of_0_shows_nothing() -> None:
    assert on_a_console_of_its_own({"refresh_rate": 0}) == ""


def test_values_that_are_no_numbers_are_shown_as_they_are() -> None:
    bar = RichProgressBar()
    assert [bar._shown(value) for value in (1.23456, "text", None, 3)] == ["1.235", "text", "None", "3.000"]


def test_it_can_be_sent_to_another_process_and_switched_off() -> None:
    bar = pickle.loads(pickle.dumps(RichProgressBar(refresh_rate=4)))
    assert (bar.refresh_rate, bar.is_enabled, bar._seconds_between_draws) == (4, True, 0.25)
    bar.disable()
    assert bar.is_disabled
    with pytest.raises(TypeError, match="no train bar"):
        _ = bar.train_progress_bar


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="refresh_rate=-1"):
        RichProgressBar(refresh_rate=-1)


@pytest.mark.parametrize("kind", [RichProgressBar, RichModelSummary])
def test_without_rich_it_says_what_to_install(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlite.callbacks.progress.rich_progress.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"{kind.__name__} .*pip install rich"):
        kind()


class WithExample(Net):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def test_the_summary_is_rich_and_can_be_shown_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    class Mine(ModelSummary):
        @staticmethod
        def summarize(
            summary_data: Any,
            total_parameters: int,
            trainable_parameters: int,
            model_size: float,
            total_training_modes: Any,
            total_flops: int,
            **summarize_kwargs: Any,
        ) -> None:
            seen.append((dict(summary_data), total_parameters, trainable_parameters, total_flops, summarize_kwargs))

    fit(RichModelSummary(header_style="green"), module=WithExample(), enable_model_summary=True, max_epochs=1)
    fit(Mine(colour="red"), module=WithExample(), enable_model_summary=True, max_epochs=1)
    out = capsys.readouterr().out
    assert re.search(r"│ 0 │ layer │ Linear │ +5 │ train │ +16 │ +\[2, 4\] │ +\[2, 1\] │", out)
    assert "Total FLOPs: 16" in out
    table = {" ": ["0"], "Name": ["layer"], "Type": ["Linear"], "Params": ["5"], "Mode": ["train"], "FLOPs": ["16"]}
    sizes = {"In sizes": ["[2, 4]"], "Out sizes": ["[2, 1]"]}
    assert seen == [({**table, **sizes}, 5, 5, 16, {"colour": "red"})]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_the_example_is_run_in_the_trainers_precision(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(ModelSummary(), enable_model_summary=True, precision=precision, max_epochs=1)
    with caplog.at_level("INFO", "lightlite"):
        run.fit(WithExample(), loader(1), loader(1))
    assert "[2, 4]   | [2, 1]" in caplog.text
