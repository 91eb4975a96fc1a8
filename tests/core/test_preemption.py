"""What a signal does to a fit: it saves and leaves, or the script's own handler has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightlite.errors import MisconfigurationException
from lightlite.utilities.exceptions import SIGTERMException

from .models import Net, assert_same_bits, quiet_trainer, regression_data, regression_loader, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader")


class Told(Net):
    """Gets a signal in the course of a batch."""

    def __init__(self, at: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.at, self.number = at, number

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.at:
            signal.raise_signal(self.number)
        return super().training_step(batch, batch_idx)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("hpc_ckpt_*"))


@pytest.mark.parametrize("at", [0, 2, 3, 5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_fit_saves_after_the_step_and_goes_on_from_there(tmp_path: Path, at: int, number: int) -> None:
    torch.manual_seed(0)
    whole = Net()
    quiet_trainer(tmp_path, max_epochs=2).fit(whole, regression_loader(4, shuffle=True))

    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    with pytest.raises(SystemExit) as caught:
        trainer.fit(Told(at, number), regression_loader(4, shuffle=True))
    assert caught.type is SIGTERMException
    assert caught.value.code == 143
    assert trainer.received_sigterm
    assert trainer.global_step == at + 1
    assert saved(tmp_path) == ["hpc_ckpt_1.ckpt"]
    assert signal.getsignal(number) is signal.SIG_DFL

    for ckpt_path in ("auto", "last", "hpc"):
        torch.manual_seed(1)
        resumed = Net()
        trainer = quiet_trainer(tmp_path, max_epochs=2)
        trainer.fit(resumed, regression_loader(4, shuffle=True), ckpt_path=ckpt_path)
        assert not trainer.received_sigterm
        assert_same_bits(weights(resumed), weights(whole))


def test_the_next_one_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for at in (1, 3):
        with pytest.raises(SIGTERMException):
            quiet_trainer(tmp_path, max_epochs=2).fit(Told(at), regression_loader(4), ckpt_path="auto")
    assert saved(tmp_path) == ["hpc_ckpt_2.ckpt"]
    assert torch.load(tmp_path / "hpc_ckpt_2.ckpt", weights_only=True)["global_step"] == 4


def test_auto_starts_from_the_beginning_without_a_word_where_there_is_nothing_yet(tmp_path: Path) -> None:
    quiet_trainer(tmp_path).fit(Net(), regression_loader(2), ckpt_path="auto")


def test_hpc_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"in {tmp_path} there is no hpc_ckpt"):
        quiet_trainer(tmp_path).fit(Net(), regression_loader(2), ckpt_path="hpc")


def test_a_handler_of_the_scripts_own_stays(tmp_path: Path) -> None:
    heard: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        quiet_trainer(tmp_path).fit(Told(1), regression_loader(4))
    finally:
        signal.signal(signal.SIGTERM, former)
    assert heard == [signal.SIGTERM]
    assert saved(tmp_path) == []


def test_a_fit_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: quiet_trainer(tmp_path).fit(Net(), regression_loader(2)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def run(folder: Path, script: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(script)
    command = [sys.executable, *options, "script.py"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, cwd=folder, text=True, env={**os.environ, **environment}, start_new_session=True, **pipes
    )


SCRIPT = """
import os, signal, time, torch, lightlite as pl
from lightlite.demos.boring_classes import BoringModel

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        print("step", flush=True)
        time.sleep({seconds})
        return super().training_step(batch, batch_idx)
    def on_train_end(self):
        {at_the_end}

trainer = pl.Trainer(accelerator="cpu", devices={devices}, max_epochs={epochs}, enable_progress_bar=False, logger=False,
    enable_model_summary=False, limit_val_batches=0, enable_checkpointing=False)
trainer.fit(Model())
print("done", flush=True)
time.sleep(30)
"""


def script(seconds: float = 0.01, devices: int = 1, epochs: int = 100, at_the_end: str = "pass") -> str:
    return SCRIPT.format(seconds=seconds, devices=devices, epochs=epochs, at_the_end=at_the_end)


def test_a_signal_that_comes_too_late_takes_its_usual_effect(tmp_path: Path) -> None:
    process = run(tmp_path, script(epochs=1, at_the_end="signal.raise_signal(signal.SIGTERM)"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert "done" not in output


def test_outside_of_a_fit_the_signal_ends_the_script_as_ever(tmp_path: Path) -> None:
    process = run(tmp_path, script(epochs=1))
    assert process.stdout is not None
    while process.stdout.readline() != "done\n":
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_ranks_whose_step_takes_longer_than_the_launchers_grace_save_all_the_same(tmp_path: Path) -> None:
    options = ("-m", "lightlite.launch", "--devices", "2", "--accelerator", "cpu", "--grace", "0.5")
    process = run(tmp_path, script(seconds=2, devices=2), *options)
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert saved(tmp_path) == ["hpc_ckpt_1.ckpt"]


def test_sigusr1_has_slurm_requeue_the_job(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    for options in ((), ("-m", "lightlite.launch", "--devices", "1", "--accelerator", "cpu")):
        process = run(tmp_path, script(), *options, PATH=path, SLURM_JOB_ID="17")
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 143, errors
    assert (tmp_path / "asked").read_text() == "requeue 17\n" * 2


class Waiting(Net):
    """Tells its process group to end, and goes on asking for batches for a while."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.2)
        return super().training_step(batch, batch_idx)


def test_loader_workers_do_not_heed_the_signal(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            loader = DataLoader(regression_data(8), 2, num_workers=1, persistent_workers=True)
            quiet_trainer(tmp_path).fit(Waiting(), loader)
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert saved(tmp_path) == ["hpc_ckpt_1.ckpt"]
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Net(), regression_loader(4), ckpt_path="hpc")
    assert trainer.global_step == 4


FAILING = """
def training_step(self, batch, batch_idx):
    if self.global_rank:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
    time.sleep(2)
    raise ValueError("of its own")
Model.training_step = training_step
try:
    trainer.fit(Model())
except ValueError:
    print("went on", flush=True)
    os._exit(0)
"""


def test_a_signal_to_a_helper_does_not_end_a_calling_process_that_has_failed_otherwise(tmp_path: Path) -> None:
    process = run(tmp_path, script(devices=2).replace("trainer.fit(Model())", FAILING))
    output, errors = process.communicate(timeout=60)
    assert output.endswith("went on\n"), errors
    assert process.returncode == 0
