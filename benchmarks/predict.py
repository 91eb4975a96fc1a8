"""Collecting predictions: rows a second, and rank zero's peak resident memory, over numbers of rows and of ranks.

    python benchmarks/predict.py
    python benchmarks/predict.py --rows 10000 1000000 --devices 1 2 4 --plot predict.png

Every run is a process of its own, which predicts a few batches for practice first; the ways take turns. `peak` is how
far rank zero's resident memory rises above what it was before the call, at any moment of it and while every row is read
afterwards; `beyond` is that less its own share of the outputs, which one rank alone would hold. The reference is a
hand-written loop on one process that keeps its outputs in a list.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import (
    Bar,
    Figures,
    Variant,
    describe_machine,
    draw,
    in_turns,
    make_parser,
    positive,
    print_bars,
    print_machine,
    write_json,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BY_HAND = "by hand"
BYTES = 4
MOST_BEYOND = 100.0
"""Megabytes that rank zero's peak may exceed its own share by, on two ranks."""
RESULT = "RESULT "


class Rows(Dataset[Tensor]):
    """Numbers, made a batch at a time."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(indices, dtype=torch.float32)]


def first(batches: list[Tensor]) -> Tensor:
    return batches[0]


class Peak:
    """The highest resident memory of this process within a block, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self._process, self._over = psutil.Process(), threading.Event()
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self._look()

    def _look(self) -> None:
        self.most = max(self.most, self._process.memory_info().rss)

    def __exit__(self, *_: Any) -> None:
        self._look()
        self._over.set()
        self._thread.join()


def widen(batch: Tensor, columns: int) -> Tensor:
    """What is predicted of a row: its number, in every column."""
    return batch[:, None].expand(-1, columns).contiguous()


def loader(rows: int, batch_size: int) -> DataLoader[Tensor]:
    return DataLoader(Rows(rows), batch_size=batch_size, collate_fn=first)


def predict_by_hand(rows: int, columns: int, batch_size: int) -> list[Tensor]:
    with torch.inference_mode():
        return [widen(batch, columns) for batch in loader(rows, batch_size)]


def worker(arguments: argparse.Namespace) -> dict[str, float]:
    """One run, in this process."""
    rows, ranks, columns, size = arguments.rows[0], arguments.devices[0], arguments.columns, arguments.batch_size
    if arguments.worker == BY_HAND:
        predict: Any = lambda count: predict_by_hand(count, columns, size)  # noqa: E731
    else:
        import lightlite as pl

        class Net(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Identity()

            def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return widen(batch, columns)

        trainer = pl.Trainer(
            accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        predict = lambda count: trainer.predict(Net(), loader(count, size))  # noqa: E731
    predict(4 * size * ranks)
    with Peak() as peak:
        start = time.perf_counter()
        outputs = predict(rows)
        seconds = time.perf_counter() - start
        expected = 0
        for batch in outputs:  # every row is there, in order, and read
            numbers = batch[:, -1]
            if not torch.equal(numbers, torch.arange(expected, expected + len(batch), dtype=torch.float32)):
                raise RuntimeError(f"the rows from {expected} on are not those that were predicted")
            expected += len(batch)
    if expected != rows:
        raise RuntimeError(f"{expected} of {rows} rows came back")
    grown = (peak.most - peak.before) / 1e6
    return {"rows/s": rows / seconds, "peak MB": grown, "beyond MB": grown - rows * columns * BYTES / ranks / 1e6}


def run_of(way: str, rows: int, ranks: int, arguments: argparse.Namespace) -> Variant:
    """One run, as something that measures itself."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--worker", way, "--rows", str(rows), "--devices", str(ranks),
        "--columns", str(arguments.columns), "--batch-size", str(arguments.batch_size),
    ]  # fmt: skip

    def measure() -> dict[str, float]:
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-3000:]}")
        result: dict[str, float] = json.loads(done.stdout.partition(RESULT)[2])
        return result

    return measure


def report(rows: int, figures: Figures) -> None:
    """One table."""
    base = statistics.median(figures[BY_HAND]["rows/s"])
    print(f"\n{f'{rows} rows':<22}{'rows/s':>12}{'min':>12}{'max':>12}{'ratio':>8}{'peak MB':>10}{'beyond MB':>11}")
    for name, per_kind in figures.items():
        speed, middle = per_kind["rows/s"], statistics.median(per_kind["rows/s"])
        peak, beyond = (statistics.median(per_kind[what]) for what in ("peak MB", "beyond MB"))
        numbers = f"{middle:12.0f}{min(speed):12.0f}{max(speed):12.0f}{middle / base:8.3f}{peak:10.1f}{beyond:11.1f}"
        print(f"{name:<22}{numbers}")


def paint(axes: list[Any], everything: dict[int, Figures]) -> None:
    for one, what in zip(axes, ("rows/s", "peak MB"), strict=True):
        for name in next(iter(everything.values())):
            one.plot(list(everything), [statistics.median(f[name][what]) for f in everything.values()], marker="o",
                     label=name)  # fmt: skip
        one.set_xscale("log")
        one.set_ylim(bottom=0)
        one.set_xlabel("rows")
        one.set_ylabel(what)
        one.legend()


def main() -> int:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=positive, nargs="+", default=[10**4, 10**5, 10**6], help="(default: 1e4 to 1e6)")
    parser.add_argument("--devices", type=positive, nargs="+", default=[1, 2, 4], help="ranks (default: 1 2 4)")
    parser.add_argument("--columns", type=positive, default=16, help="floats in an output's row (default: 16)")
    parser.add_argument("--batch-size", type=positive, default=256, help="rows (default: 256)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(RESULT + json.dumps(worker(arguments)), flush=True)
        return 0
    machine = describe_machine()
    print_machine(machine)
    everything: dict[int, Figures] = {}
    for rows in arguments.rows:
        variants = {BY_HAND: run_of(BY_HAND, rows, 1, arguments)}
        variants |= {
            f"lightlite, {ranks} rank{'s' * (ranks > 1)}": run_of("lightlite", rows, ranks, arguments)
            for ranks in arguments.devices
        }
        everything[rows] = in_turns(variants, arguments.rounds, warmup=0)
        report(rows, everything[rows])
    bars = []
    most = everything[max(everything)].get("lightlite, 2 ranks")
    if most is not None:
        beyond = statistics.median(most["beyond MB"])
        bars = [Bar(f"rank zero's peak beyond its own share of {max(everything)} rows", beyond, MOST_BEYOND, "MB")]
    held = print_bars(bars)
    write_json(arguments.json, machine, arguments, figures=everything, bars=bars)
    draw(arguments.plot, lambda axes: paint(axes, everything), columns=2)
    return 1 if arguments.strict and not held else 0


if __name__ == "__main__":
    sys.exit(main())
