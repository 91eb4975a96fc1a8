"""Kills a training run at random moments, resumes it each time, and compares what it ends with to an undisturbed run.

    python tests/faults/kill_resume.py --trials 20 --seed 0 --workers 2 --ranks 2

Each trial trains the example `scripts/examples/digits.py` (with augmentation, dropout, accumulation of 3, AdamW, a
scheduler by step, averaged weights, loader workers that persist), ends the whole run by SIGKILL at a random moment,
goes on with `ckpt_path="last"`, is killed again, until it comes to its end. Weights, optimizer state, the log and the
best checkpoints must be those of the run that was never killed, to the bit.

With `--operations N` the moments are not random: the run is killed before the first file operation that gives a file
its name or removes one, in another trial before the one N later, and so on to its end.

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

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightlite as pl
from lightlite.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightlite.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/examples"))

from digits import ConvNet, Digits

EPOCHS = 2


class Augmented(Dataset[Any]):
    """Images, each time moved and blurred anew, by random numbers of all three kinds."""

    def __init__(self, images: Dataset[Any]) -> None:
        self._images: Any = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._images[index]
        moved = torch.roll(image, (random.randint(-1, 1), int(np.random.randint(-1, 2))), (1, 2))
        return moved + 0.1 * torch.randn(image.shape), label


class Batches(Digits):
    """The example's digits, augmented."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_set = Augmented(self.train_set)  # type: ignore[assignment]
        self.val_set = Augmented(self.val_set)  # type: ignore[assignment]

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        return DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            shuffle=True,  # by the generator that the model uses, too
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )


def train(folder: Path, ranks: int, workers: int) -> None:
    """Train to the end, from wherever the folder's last checkpoint left off; write `end.pt`."""
    pl.seed_everything(5, workers=True, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_epochs=EPOCHS,
        accumulate_grad_batches=3,
        val_check_interval=10,
        log_every_n_steps=2,
        gradient_clip_val=1.0,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, name="", version="log"),
        callbacks=[
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(folder / "steps", every_n_train_steps=1, save_last=True, save_top_k=0),
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2, mode="max"),
            ModelCheckpoint(folder / "often", every_n_train_steps=4, monitor="train_loss", save_top_k=2),
            ModelCheckpoint(folder / "newest", save_on_train_epoch_end=True, save_last=True, save_top_k=0),
            ModelCheckpoint(folder / "epochs", "{epoch}", "val_loss", save_top_k=-1, save_on_train_epoch_end=True),
        ],
    )
    module = ConvNet()
    trainer.fit(module, datamodule=Batches(workers=workers), ckpt_path="last")
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
