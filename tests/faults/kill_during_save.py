"""Kills writers of checkpoints at random moments, and looks at what they leave behind.

    python tests/faults/kill_during_save.py --trials 1000 --seed 0

Each trial forks a process that saves one checkpoint after the other over the same names, ends it by SIGKILL at a random
moment, and then loads every file that bears a checkpoint's name: each must be whole, and hold one of the states that
were saved. The next save must leave no temporary file behind. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from lightlite import storage
from lightlite.saving import AsyncCheckpointIO, TorchCheckpointIO

NAMES = ("last.ckpt", "epoch=0-step=1.ckpt")


def state(number: int, megabytes: float) -> dict[str, object]:
    """A state that tells whether it is whole: every tensor is filled with its number."""
    length = int(megabytes * 2**20 / 4 / 4)
    return {"number": number, "state_dict": {str(part): torch.full((length,), float(number)) for part in range(4)}}


def is_whole(path: Path) -> bool:
    """Whether a file holds one state, and all of it."""
    read = storage.read(path)
    return all(bool((tensor == read["number"]).all()) for tensor in read["state_dict"].values())


def _write_for_ever(folder: Path, megabytes: float, started: int, asynchronous: bool) -> None:
    number = 0
    writer = AsyncCheckpointIO() if asynchronous else TorchCheckpointIO()
    while True:
        for name in NAMES:
            number += 1
            content = state(number, megabytes)
            if number == 1:
                os.write(started, b"x")
            writer.save_checkpoint(content, folder / name)


def one_trial(folder: Path, megabytes: float, delay: float, asynchronous: bool) -> Counter[str]:
    """Kill a writer `delay` seconds after its first save has begun; return what was found afterwards."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _write_for_ever(folder, megabytes, writer, asynchronous)
        finally:
            os._exit(3)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    found: Counter[str] = Counter()
    found["not killed by us"] += os.WTERMSIG(status) != signal.SIGKILL
    found["killed within a save"] += any(path.name.endswith(storage.UNFINISHED) for path in folder.iterdir())
    for path in folder.glob("*.ckpt"):
        found["files looked at"] += 1
        try:
            found["not whole"] += not is_whole(path)
        except Exception as error:  # whatever it is, it is what is looked for
            found["not loadable"] += 1
            print(f"{path.name}: {type(error).__name__}: {error}", flush=True)
    storage.write(state(0, 0.01), folder / NAMES[0])
    found["litter after the next save"] += any(not path.name.endswith(".ckpt") for path in folder.iterdir())
    return found


def main() -> int:
    """Run the trials; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="how many writers to kill (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--megabytes", type=float, default=4.0, help="size of a checkpoint (4)")
    parser.add_argument("--asynchronous", action="store_true", help="let another thread write")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must find no threads
    chance = random.Random(options.seed)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        storage.write(state(0, options.megabytes), Path(folder) / NAMES[0])
        storage.read(Path(folder) / NAMES[0])
        took = time.monotonic() - began
        for trial in range(options.trials):
            total += one_trial(Path(folder), options.megabytes, chance.uniform(0, 3 * took), options.asynchronous)
            if (trial + 1) % 100 == 0:
                print(f"{trial + 1} trials: {dict(total)}", flush=True)
    wrong = {
        name: count
        for name, count in total.items()
        if count and name not in ("killed within a save", "files looked at")
    }
    print(
        f"{options.trials} trials, {total['killed within a save']} of them within a save; wrong: {wrong or 'nothing'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
