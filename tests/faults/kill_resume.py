"""Kills a training run at random moments, resumes it each time, and compares what it ends with to an undisturbed run.

    python tests/faults/kill_resume.py --trials 20 --seed 0 --workers 2 --ranks 2

Each trial trains a small network (augmentation, dropout, accumulation of 3, AdamW, a scheduler by step, averaged
weights), ends the whole run by SIGKILL at a random moment, goes on with `ckpt_path="last"`, is killed again, until it
comes to its end. Weights, optimizer state, the log and the best checkpoints must be those of the run that was never
killed, to the bit.

With `--operations N` the moments are not random: the run is killed before the first file operation that gives a file
its name or removes one, in another trial before the one N later, and so on to its end.

One difference is known: augmentation in loader workers, `--workers 1` and more.

Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightlite as pl
from lightlite.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightlite.loggers import CSVLogger


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Points of three clouds, jittered anew each time they are asked for."""

    def __init__(self, samples: int, jitter: float) -> None:
        generator = torch.Generator().manual_seed(samples)
        self._labels = torch.randint(3, (samples,), generator=generator)
        self._points = torch.randn(samples, 8, generator=generator) + self._labels[:, None]
        self._jitter = jitter

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._points[index] + self._jitter * torch.randn(8), self._labels[index]


class Classifier(pl.LightningModule):
    """Two layers with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train(folder: Path, ranks: int, workers: int) -> None:
    """Train to the end, from wherever the folder's last checkpoint left off; write `end.pt`."""
    pl.seed_everything(5, workers=True, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_epochs=4,
        accumulate_grad_batches=3,
        val_check_interval=10,
        log_every_n_steps=2,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, name="", version="log"),
        callbacks=[
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(folder / "steps", every_n_train_steps=1, save_last=True, save_top_k=0),
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2, mode="max"),
            ModelCheckpoint(folder / "often", every_n_train_steps=4, monitor="loss", save_top_k=2),
            ModelCheckpoint(folder / "newest", save_on_train_epoch_end=True, save_last=True, save_top_k=0),
            ModelCheckpoint(folder / "epochs", "{epoch}", "val_loss", save_top_k=-1, save_on_train_epoch_end=True),
        ],
    )
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    module = Classifier()
    trainer.fit(
        module,
        DataLoader(Noisy(200, 0.1), batch_size=8 // ranks, shuffle=True, **options),
        DataLoader(Noisy(40, 0.0), batch_size=8),
        ckpt_path="last",
    )
    torch.save(
        {
            "weights": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "global_step": trainer.global_step,
        },
        folder / "end.pt",
    )


class Operations:
    """Counts what is done to files, and kills the process before one of them.

    Args:
        last: Number of the operation that is not done any more, from 1; 0 for none.
    """

    def __init__(self, last: int) -> None:
        self.count, self._last = 0, last
        for name in ("replace", "remove", "unlink"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, operation: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            operation(*args, **kwargs)

        return call


def _started(folder: Path, ranks: int, workers: int, last_operation: int = 0) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 4
    try:
        os.setsid()
        warnings.simplefilter("ignore")
        operations = Operations(last_operation)
        train(folder, ranks, workers)
        (folder / "operations").write_text(str(operations.count))
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(folder: Path, ranks: int, workers: int, delays: Iterator[float]) -> int:
    """Train, killed after each of `delays` if it is not done by then; return how often it was killed."""
    kills = 0
    while True:
        pid = _started(folder, ranks, workers)
        deadline = time.monotonic() + next(delays, 1e9)
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                if os.waitstatus_to_exitcode(status) != 0:
                    raise RuntimeError(f"the run ended by itself with {os.waitstatus_to_exitcode(status)}")
                return kills
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                break
            time.sleep(0.002)


def run_until(operation: int, folder: Path, ranks: int, workers: int) -> None:
    """Train, killed before a file operation, and once more to the end."""
    os.waitpid(_started(folder, ranks, workers, operation), 0)
    run(folder, ranks, workers, iter(()))


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs between two folders of runs."""
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.glob("*/*") if path.suffix != ".bak")
        for folder in (whole, killed)
    ]
    found = [f"the names {sorted(set(names[0]) ^ set(names[1]))}"] if names[0] != names[1] else []
    if (whole / "log/metrics.csv").read_text() != (killed / "log/metrics.csv").read_text():
        found.append("log")
    for name in ["end.pt", *(name for name in names[0] if name in names[1] and name.endswith(".ckpt"))]:
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
        if not all(
            _same(one.get(key), other.get(key)) for key in ("state_dict", "weights", "optimizer", "global_step")
        ):
            found.append(name)
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def main() -> int:
    """Run the trials; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="how many runs to disturb (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--ranks", type=int, default=1, help="devices (1)")
    parser.add_argument("--workers", type=int, default=2, help="loader workers (2)")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="kill before every N-th file operation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    wrong = kills = 0
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        began = time.monotonic()
        run(whole, options.ranks, options.workers, iter(()))
        took = time.monotonic() - began
        count = int((whole / "operations").read_text())
        trials = range(1, count + 1, options.operations) if options.operations else range(options.trials)
        for trial in trials:
            if options.operations:
                run_until(trial, killed, options.ranks, options.workers)
                times = 1
            else:
                delays = iter([chance.uniform(0, took) for _ in range(chance.randint(1, 4))])
                times = run(killed, options.ranks, options.workers, delays)
            found = differences(whole, killed)
            kills += times
            wrong += bool(found)
            print(
                f"trial {trial}: killed {times} times, {'differs in ' + ', '.join(found) if found else 'equal'}",
                flush=True,
            )
            shutil.rmtree(killed)
    print(f"{len(trials)} trials, {kills} kills, {wrong} with differences; an undisturbed run takes {took:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
