"""What a training step costs beside the model: lightlite's `fit` against the loop one would write by hand.

The model is so small, Linear(32, 2) on batches of 8, that a step is mostly the loop around it. All variants
run in turns in one process (A B C A B C ...), so that a machine that slows down slows all of them down. The
clock is read twice per fit, by the iterable that hands out the batches: before the first timed one and after
the last. Set-up, warm-up and the end of a fit are outside of it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --peers --json overhead.json
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES, BATCH_SIZE, LEARNING_RATE = 32, 2, 8, 0.01
BARS = {"lightlite": 1.10, "lightlite, one log": 1.20}
"""The most that a variant's median may be, as a multiple of the hand-written loop's."""


class TimedBatches:
    """Batches made in advance; the time is noted when the first timed one, and the one after the last, is asked for.

    A trainer that fetches a batch ahead reads both clocks one step earlier, so the span is the same. The few
    batches after the timed ones are there because a trainer that knows the length never asks beyond the end.
    """

    COOLDOWN = 5

    def __init__(self, warmup: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        batches = [
            (
                torch.randn(BATCH_SIZE, FEATURES, generator=generator),
                torch.randint(CLASSES, (BATCH_SIZE,), generator=generator),
            )
            for _ in range(warmup + steps + self.COOLDOWN)
        ]
        self.warmup, self.timed, self.cooldown = (
            batches[:warmup],
            batches[warmup : warmup + steps],
            batches[warmup + steps :],
        )
        self._seconds: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.warmup) + len(self.timed) + len(self.cooldown)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.warmup
        wall, cpu = time.perf_counter(), time.process_time()
        yield from self.timed
        self._seconds = time.perf_counter() - wall, time.process_time() - cpu
        yield from self.cooldown

    def take_seconds(self) -> tuple[float, float]:
        """Wall and CPU time of the last pass's timed steps; a pass is read once, so no figure can be a stale one."""
        seconds, self._seconds = self._seconds, None
        if seconds is None:
            raise RuntimeError("the batches were not all used, so there is no time to report")
        return seconds


def train_by_hand(batches: TimedBatches) -> None:
    """The loop that every ratio refers to."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trainer_variant(package: str, log: bool) -> Callable[[TimedBatches], None]:
    """The same training by `package`'s Trainer, without bar, logger, checkpoints and summary.

    Args:
        package: "lightlite" or "pytorch_lightning"; the program is the same for both.
        log: Whether the training step logs its loss.
    """
    pl = importlib.import_module(package)

    class Bare(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.layer(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    class Logging(Bare):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.layer(x), y)
            self.log("loss", loss)
            return loss

    def train(batches: TimedBatches) -> None:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Logging() if log else Bare(), batches)

    return train


def make_variants(peers: bool) -> dict[str, Callable[[TimedBatches], None]]:
    """What is measured, by the name it has in the table; the first is what the others are compared with."""
    variants = {
        "by hand": train_by_hand,
        "lightlite": trainer_variant("lightlite", log=False),
        "lightlite, one log": trainer_variant("lightlite", log=True),
    }
    if peers:
        if importlib.util.find_spec("pytorch_lightning") is None:
            sys.exit("--peers needs pytorch-lightning: pip install 'lightlite[bench]'")
        variants["pytorch-lightning"] = trainer_variant("pytorch_lightning", log=False)
        variants["pytorch-lightning, one log"] = trainer_variant("pytorch_lightning", log=True)
    return variants


def measure(
    variants: dict[str, Callable[[TimedBatches], None]], rounds: int, warmup: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Microseconds per step of every variant, "wall" and "cpu", one figure of each a round."""
    batches = TimedBatches(warmup, steps)
    for train in variants.values():  # imports, caches and the allocator's first growth belong to nobody's figures
        train(batches)
        batches.take_seconds()
    costs: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in variants}
    for done in range(rounds):
        for name, train in variants.items():
            gc.collect()
            train(batches)
            for clock, seconds in zip(("wall", "cpu"), batches.take_seconds(), strict=True):
                costs[name][clock].append(seconds / steps * 1e6)
        if sys.stderr.isatty():
            print(f"\rround {done + 1} of {rounds}", end="" if done + 1 < rounds else "\r\033[K", file=sys.stderr)
    return costs


def summarize(costs: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Minimum, median and maximum by the wall clock, and the medians as multiples of the first variant's."""
    reference = {clock: statistics.median(figures) for clock, figures in next(iter(costs.values())).items()}
    return {
        name: {
            "min": min(figures["wall"]),
            "median": statistics.median(figures["wall"]),
            "max": max(figures["wall"]),
            "ratio": statistics.median(figures["wall"]) / reference["wall"],
            "cpu_median": statistics.median(figures["cpu"]),
            "cpu_ratio": statistics.median(figures["cpu"]) / reference["cpu"],
        }
        for name, figures in costs.items()
    }


def describe_machine() -> dict[str, Any]:
    """Enough to judge the figures by."""
    packages = {}
    for name in ("torch", "lightlite", "pytorch-lightning"):
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            packages[name] = version(name)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def report(summary: dict[str, dict[str, float]]) -> bool:
    """Print the table and whether the bars hold; returns the latter."""
    print(f"\n{'microseconds per step':<28}{'min':>9}{'median':>9}{'max':>9}{'ratio':>8}{'CPU time':>12}{'ratio':>8}")
    for name, row in summary.items():
        wall = f"{row['min']:9.1f}{row['median']:9.1f}{row['max']:9.1f}{row['ratio']:8.2f}"
        print(f"{name:<28}{wall}{row['cpu_median']:12.1f}{row['cpu_ratio']:8.2f}")
    print()
    held = True
    for name, bar in BARS.items():
        ratio, holds = summary[name]["ratio"], summary[name]["ratio"] <= bar
        held = held and holds
        print(f"{name}: {ratio:.3f} times the hand-written loop, {'within' if holds else 'OVER'} {bar:.2f}")
    return held


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=60, help="turns that every variant gets (default: 60)")
    parser.add_argument("--steps", type=int, default=1000, help="timed steps per turn (default: 1000)")
    parser.add_argument(
        "--warmup", type=int, default=100, help="steps before the clock starts, per turn (default: 100)"
    )
    parser.add_argument("--peers", action="store_true", help="measure pytorch-lightning too, which must be installed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure and the machine's description")
    parser.add_argument("--assert", dest="strict", action="store_true", help="exit with 1 where a bar does not hold")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.steps) < 1 or arguments.warmup < 0:
        parser.error("--rounds and --steps must be at least 1, --warmup at least 0")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    logging.disable(logging.INFO)  # what the trainers say of themselves, once per fit
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    machine = describe_machine()
    print(
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_average'][0]:.1f}; {machine['system']}"
    )
    print(f"Python {machine['python']}, " + ", ".join(f"{name} {v}" for name, v in machine["packages"].items()))
    print(
        f"Linear({FEATURES}, {CLASSES}), batch {BATCH_SIZE}, SGD, {machine['threads']} thread; "
        f"{arguments.rounds} rounds in turns, {arguments.steps} steps each"
    )
    where_to_write = arguments.json.resolve() if arguments.json else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        costs = measure(make_variants(arguments.peers), arguments.rounds, arguments.warmup, arguments.steps)
        os.chdir("/")
    summary = summarize(costs)
    held = report(summary)
    if where_to_write is not None:
        settings = {"rounds": arguments.rounds, "steps": arguments.steps, "warmup": arguments.warmup}
        content = {"machine": machine, "settings": settings, "summary": summary, "microseconds_per_step": costs}
        where_to_write.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if arguments.strict and not held else 0


if __name__ == "__main__":
    sys.exit(main())
