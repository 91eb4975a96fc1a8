"""Tells a training run to end by SIGTERM at random moments, and looks at how it does.

    python tests/faults/preempt.py --trials 50 --seed 0 --launcher script

Each trial trains a small network on two ranks (dropout, accumulation of 2, validation within the epoch, loader
workers), sends SIGTERM to one of the ranks, to the program that was started, or to all of its process group, and sees
to it that the run ends with exit code 143 within 10 seconds, that it has left one checkpoint for that, that both ranks
had come to the same batch, which is the checkpoint's, and that going on from there by `ckpt_path="auto"` ends with the
weights of a run that was not disturbed, to the bit.

Exits with 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl

MOST = 10.0
"""Seconds that a run may take to end."""

BATCHES, EPOCHS = 60, 3


class Slow(pl.LightningModule):
    """A small network that takes a while, and notes each batch in a file of its rank."""

    def __init__(self, folder: Path, pause: float) -> None:
        super().__init__()
        self._folder, self._pause = folder, pause
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def on_train_start(self) -> None:
        (self._folder / f"pid-{self.global_rank}").write_text(str(os.getpid()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self._pause)
        return self.layers(batch[0]).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.trainer.fit_loop is not None
        (self._folder / f"batches-{self.global_rank}").write_text(str(self.trainer.progress.batches_total))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layers(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def train(folder: Path, devices: int, pause: float) -> None:
    """Train to the end, from where it was told to end the last time; write `end.pt`."""
    pl.seed_everything(1, verbose=False)
    data = TensorDataset(torch.randn(BATCHES * 4, 4, generator=torch.Generator().manual_seed(0)))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=25,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=folder,
    )
    module = Slow(folder, pause)
    loader = DataLoader(data, 2, shuffle=True, num_workers=1, persistent_workers=True)
    trainer.fit(module, loader, DataLoader(data, 40), ckpt_path="auto")
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "end.pt")


def _command(folder: Path, launcher: str, pause: float) -> list[str]:
    own = [__file__, "--train", str(folder), "--pause", str(pause)]
    if launcher == "script":
        return [sys.executable, *own]
    return [sys.executable, "-m", "lightlite.launch", "--devices", "2", "--accelerator", "cpu", *own]


def _started(folder: Path, launcher: str, pause: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        _command(folder, launcher, pause), stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def disturb(folder: Path, launcher: str, chance: random.Random) -> tuple[list[str], float]:
    """One run that is told to end; what was wrong with it, and how long it took to end."""
    pause = 0.01
    process = _started(folder, launcher, pause)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("pid-*"))) < 2:
        if process.poll() is not None or time.monotonic() > deadline:
            return [f"the run did not begin: {process.communicate()[1]}"], 0.0
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.8 * BATCHES // 2 * EPOCHS * pause))
    ranks = [int((folder / f"pid-{rank}").read_text() or process.pid) for rank in range(2)]
    whom = chance.choice([[ranks[0]], [ranks[1]], ranks, [process.pid], "group"])
    began = time.monotonic()
    if whom == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        for pid in whom:
            os.kill(int(pid), signal.SIGTERM)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return ["it hung"], 60.0
    took = time.monotonic() - began
    wrong = [f"exit code {process.returncode}: {errors}"] if process.returncode != 143 else []
    wrong += [f"it took {took:.1f} s to end"] if took > MOST else []
    saved = sorted(folder.glob("**/hpc_ckpt_*.ckpt"))
    if len(saved) != 1:
        return [*wrong, f"checkpoints {[path.name for path in saved]}: {errors}"], took
    progress = torch.load(saved[0], weights_only=True)["lightlite"]["progress"]["batches_total"]
    batches = [int((folder / f"batches-{rank}").read_text()) for rank in range(2)]
    if {progress} != set(batches):
        wrong.append(f"ranks came to batches {batches}, the checkpoint is of {progress}")
    return wrong, took


def finished(folder: Path, launcher: str) -> Any:
    """The weights of a run that is not disturbed, or no more."""
    process = _started(folder, launcher, 0.0)
    errors = process.communicate(timeout=120)[1]
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {errors}")
    return torch.load(folder / "end.pt", weights_only=True)


def main() -> int:
    """Run the trials; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="how many runs to disturb (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--launcher", choices=("script", "cli"), default="script", help="what starts the ranks")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, 2, options.pause)
        return 0
    chance = random.Random(options.seed)
    failed, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        expected = finished(whole, options.launcher)
        for trial in range(options.trials):
            folder = Path(name, f"trial{trial}")
            folder.mkdir()
            wrong, took = disturb(folder, options.launcher, chance)
            if not wrong:
                weights = finished(folder, options.launcher)
                wrong = [key for key, value in expected.items() if not torch.equal(value, weights[key])]
            failed, slowest = failed + bool(wrong), max(slowest, took)
            print(f"trial {trial}: ended in {took:.2f} s{', ' + '; '.join(wrong) if wrong else ''}", flush=True)
            shutil.rmtree(folder)
    print(f"{options.trials} trials, {failed} not as they should be, the slowest ended in {slowest:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
