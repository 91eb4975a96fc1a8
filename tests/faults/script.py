"""The script under test: two ranks go through one stage, and one of them commits one fault in its third step.

`python script.py FAULT RANK STAGE FOLDER TIMEOUT`. In FOLDER every rank tells in its second step that it is ready,
and waits in its third for the file `go`; right before the fault the time is written to the file `fault`. The rank's
two loader workers are alive by then, and so is a program that it started itself.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import lightlite as pl
from lightlite import distributed

FAULT, CULPRIT, STAGE, FOLDER = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
TIMEOUT = float(sys.argv[5]) or None
BATCH_SIZE = 4
OUTPUT_TOO_BIG = 2**21
STARTS_A_PROGRAM = FAULT not in ("unpicklable", "disk full")
"""A run that ends well has no business with programs that its script started and did not end."""


def wait_for_go() -> None:
    while not (FOLDER / "go").exists():
        time.sleep(0.01)


def note_time() -> None:
    part = FOLDER / f"fault.{os.getpid()}"
    part.write_text(repr(time.time()))
    part.replace(FOLDER / "fault")


def hang_here() -> None:
    while True:
        time.sleep(0.1)


def hang_here_in_a_collective() -> None:
    dist.recv(torch.zeros(1), src=1 - distributed.rank())


def fill_disk() -> Any:
    """A file without a name that takes all there is; it has to stay open."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    try:
        for _ in range(64):
            file.write(bytes(2**16))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
    return file


def commit(stage: str) -> Any:
    """Do it; what is returned is the step's output."""
    match FAULT:
        case "raise":
            raise ValueError(f"boom on rank {distributed.rank()}")
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(7)
        case "SIGKILL" | "SIGSEGV" | "SIGSTOP":
            os.kill(os.getpid(), getattr(signal, FAULT))
        case "hang":
            hang_here()
        case "hang in a collective":
            hang_here_in_a_collective()
        case "unpicklable":
            return threading.Lock()
        case "disk full":
            return torch.zeros(OUTPUT_TOO_BIG) if stage == "predict" else fill_disk()
    return None


class Samples(Dataset[Tensor]):
    """The culprit's first worker fails in its second batch, which is the rank's third, if that is the fault."""

    def __init__(self) -> None:
        self.seen = 0

    def __len__(self) -> int:
        return 16 * BATCH_SIZE

    def __getitem__(self, index: int) -> Tensor:
        worker = get_worker_info()
        if FAULT == "loader worker" and distributed.rank() == CULPRIT and worker is not None and worker.id == 0:
            self.seen += 1
            if self.seen > BATCH_SIZE:
                wait_for_go()
                note_time()
                raise ValueError(f"bad sample on rank {CULPRIT}")
        return torch.full((4,), float(index))


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.steps = 0

    def one_step(self, stage: str) -> Any:
        self.steps += 1
        rank = distributed.rank()
        if self.steps == 2:
            # Programs that the calling process itself starts are the script's own; helpers and launched ranks are ours.
            if STARTS_A_PROGRAM and "LOCAL_RANK" in os.environ:
                self.program = subprocess.Popen(["sleep", "1000"])
            (FOLDER / f"ready-{rank}").touch()
        if self.steps == 3:
            wait_for_go()
            if rank == CULPRIT and FAULT != "loader worker":
                note_time()
                return commit(stage)
        if self.steps > 3:
            time.sleep(0.05)  # the others are still at work when it happens
        return None

    def training_step(self, batch: Tensor) -> Any:
        extra = self.one_step("fit")
        return {"loss": self.layer(batch).mean(), "extra": extra}

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        extra = self.one_step("validate")
        self.log("mean", batch.mean())
        return extra

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        extra = self.one_step("predict")
        return batch_idx if extra is None else extra

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


trainer = pl.Trainer(
    accelerator="cpu",
    devices=2,
    timeout=TIMEOUT,
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
getattr(trainer, STAGE)(Model(), DataLoader(Samples(), batch_size=BATCH_SIZE, num_workers=2))
sys.stdout.write("finished\n")
