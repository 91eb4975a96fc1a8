from __future__ import annotations

import os
import pickle
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightlite.callbacks import ProgressBar, TQDMProgressBar
from lightlite.errors import MisconfigurationException
from lightlite.loggers import CSVLogger

from .programs import Net, fit, loader, trainer

PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from callbacks.programs import Net, loader, trainer
from lightlite.callbacks import TQDMProgressBar

class Bar(TQDMProgressBar):
    def init_validation_tqdm(self):
        bar = super().init_validation_tqdm()
        bar.set_description("running validation ...")
        return bar

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch == {renamed}:
            self.train_progress_bar.set_description("my epoch")

class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.02)

run = trainer({kind}(**{options}), max_epochs={epochs}, enable_progress_bar=True)
run.fit(Slow(), loader({batches}), loader({batches} * 3 // 4))
run.progress_bar_callback.print("between")
run.test(Slow(), loader(4), verbose=False)
"""


def in_a_terminal(
    epochs: int = 2, batches: int = 20, kind: str = "TQDMProgressBar", renamed: int = -1, **options: Any
) -> str:
    """What a program with a bar writes to a terminal of 80 columns."""
    program = PROGRAM.format(
        tests=str(Path(__file__).parents[1]),
        options=options,
        epochs=epochs,
        batches=batches,
        kind=kind,
        renamed=renamed,
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
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
    for piece in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[A":
            row -= 1
        else:
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line.strip() for line in lines if line.strip()]


def test_in_a_terminal_a_bar_shows_epoch_speed_and_values() -> None:
    written = in_a_terminal()
    stays = [line for line in on_screen(written) if "|" in line or line == "between"]
    assert re.fullmatch(r"Epoch 1/1: 100%\|.*\| 20/20 \[00:00<00:00, \d\d\.\d+it/s, train_loss=[\d.e-]+\]", stays[0])
    assert stays[1] == "between"
    assert re.fullmatch(r"Testing: 100%\|.*\| 4/4 \[00:00<00:00, .*it/s\]", stays[2])
    assert "Validation:" in written
    assert "Validation" not in "".join(stays)


def test_it_is_drawn_by_the_clock() -> None:
    written = in_a_terminal()
    assert 6 <= written.count("Epoch 0/1:") <= 20
    assert 2 <= written.count("Validation:") <= 14


def test_epochs_too_quick_to_draw_each_are_drawn_now_and_then() -> None:
    written = in_a_terminal(epochs=40, batches=1)
    drawn = {int(epoch) for epoch in re.findall(r"Epoch (\d+)/39:", written)}
    assert max(drawn) == 39
    assert 5 <= len(drawn) <= 38


def test_each_epochs_bar_stays_where_asked_for() -> None:
    stays = "\n".join(on_screen(in_a_terminal(leave=True)))
    assert "Epoch 0/1: 100%" in stays
    assert "Epoch 1/1: 100%" in stays


def test_a_rate_of_0_shows_nothing() -> None:
    assert on_screen(in_a_terminal(refresh_rate=0))[-1].endswith("between") is True


def test_bars_and_what_they_say_can_be_changed() -> None:
    written = in_a_terminal(epochs=3, kind="Bar", renamed=1)
    assert re.search(r"my epoch: +\d+%\|", written)
    assert "Epoch 1/2:" not in written.split("my epoch", 1)[1].split("Epoch 2/2:", 1)[0]
    assert re.search(r"running validation \.\.\.: +[1-9]\d*%", written)
    assert not re.search(r"Validation: +[1-9]", written)
    assert any(line.startswith("Epoch 2/2: 100%") for line in on_screen(written))


def test_code_that_changes_a_bar_runs_without_a_terminal_too(capsys: pytest.CaptureFixture[str]) -> None:
    class Renamed(TQDMProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            self.train_progress_bar.set_description("mine")

    fit(Renamed(), enable_progress_bar=True, max_epochs=1)
    assert capsys.readouterr().out.startswith("Epoch 0/0: 4/4")
    with pytest.raises(TypeError, match="no train bar before a run begins"):
        _ = TQDMProgressBar().train_progress_bar


def test_a_bar_of_ones_own_learns_of_each_loader(capsys: pytest.CaptureFixture[str]) -> None:
    class PerLoader(ProgressBar):
        def on_predict_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if self.has_dataloader_changed(dataloader_idx):
                self.print(dataloader_idx, self.total_predict_batches_current_dataloader)

        def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
            self.reset_dataloader_idx_tracker()

    class TwoLoaders(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch

    run = trainer(PerLoader(), enable_progress_bar=True)
    for _ in range(2):
        run.predict(TwoLoaders(), [loader(2), loader(3)])
    assert capsys.readouterr().out == "0 2\n1 3\n" * 2


def test_the_rate_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MINITERS", "5")
    assert [TQDMProgressBar(refresh_rate=rate).refresh_rate for rate in (0, 1, 7)] == [0, 5, 7]


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(TQDMProgressBar(), logger=CSVLogger("."), enable_progress_bar=True, max_epochs=2)
    run.test(Net(), loader(3), verbose=False)
    out = capsys.readouterr().out
    assert "\r" not in out
    lines = out.splitlines()
    assert re.fullmatch(r"Epoch 1/1: 4/4, 0:00:00, \d+\.\d\dit/s, v_num=0, train_loss=[\d.e-]+", lines[-2])
    assert re.fullmatch(r"Testing: 3/3, 0:00:00, \d+\.\d\dit/s", lines[-1])
    assert len(lines) <= 3


def test_many_quick_epochs_make_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    fit(TQDMProgressBar(), enable_progress_bar=True, max_epochs=30)
    assert len(capsys.readouterr().out.splitlines()) <= 8


class Counting(TQDMProgressBar):
    reads = 0

    def get_metrics(self, *args: Any) -> Any:
        self.reads += 1
        return super().get_metrics(*args)


def test_values_are_read_only_to_be_drawn() -> None:
    bar = Counting()
    run = trainer(bar, enable_progress_bar=True, max_epochs=2)
    run.fit(Net(), loader(200), loader(1))
    assert 1 <= bar.reads <= 4


def test_a_batch_costs_next_to_nothing() -> None:
    bar = TQDMProgressBar()
    run = fit(bar, enable_progress_bar=True, max_epochs=1)
    bar._fit.due = time.monotonic() + 1000
    batches = 20_000
    least = min(_seconds(bar, run, batches) for _ in range(5))
    assert least / batches < 5e-6


def _seconds(bar: TQDMProgressBar, run: Any, batches: int) -> float:
    start = time.perf_counter()
    for index in range(batches):
        bar.on_train_batch_end(run, None, None, None, index)  # type: ignore[arg-type]
    return time.perf_counter() - start


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar()
    bar.disable()
    assert bar.is_disabled
    fit(bar, enable_progress_bar=True)
    assert capsys.readouterr().out == ""
    bar.enable()
    assert bar.is_enabled


def test_what_is_shown_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(TQDMProgressBar):
        def get_metrics(self, *args: Any) -> Any:
            return {"answer": 42, "loss": 0.00001234, "where": "here"}

    fit(Mine(), enable_progress_bar=True, max_epochs=1)
    assert capsys.readouterr().out.endswith("it/s, answer=42, loss=1.23e-05, where=here\n")


def test_a_bar_of_ones_own_needs_only_the_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    class Words(ProgressBar):
        def disable(self) -> None:
            pass

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.print(self.train_description, self.total_train_batches, self.total_val_batches)

    fit(Words(), enable_progress_bar=True, max_epochs=2)
    assert capsys.readouterr().out == "Epoch 0/1 4 1\nEpoch 1/1 4 1\n"


def test_it_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(TQDMProgressBar(refresh_rate=3))).refresh_rate == 3


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="refresh_rate=-1"):
        TQDMProgressBar(refresh_rate=-1)
