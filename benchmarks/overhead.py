"""What a batch costs beside the model: lightlite's loops against those one would write by hand, and other trainers'.

The model is so small, Linear(32, 2) on batches of 8, that a step is mostly the loop around it. All variants
run in turns in one process (A B C A B C ...), so that a machine that slows down slows all of them down. The
clock is read twice per call, by the iterable that hands out the batches: before the first timed one and after
the last. Set-up, warm-up and the end of a call are outside of it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rivals --json overhead.json --plot overhead.png
    python benchmarks/overhead.py --sweep --plot sweep.png
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    Bar,
    Figures,
    Variant,
    compare,
    describe_machine,
    draw,
    in_turns,
    installed_rivals,
    make_parser,
    paint_rows,
    positive,
    print_bars,
    print_machine,
    print_table,
    write_json,
)
from torch import Tensor, nn

FEATURES, CLASSES, BATCH_SIZE, LEARNING_RATE = 32, 2, 8, 0.01
ACCUMULATE, CLIP = 4, 1.0
BY_HAND = "by hand"
RATIOS = {"lightlite": 1.07, "lightlite, 1 log": 1.15, "lightlite, everything on": 1.30}
"""The most that a variant's median may be, as a multiple of the hand-written loop's."""
MORE = {"validate": 5.0, "predict": 5.0}
"""The most that a batch may cost beyond the hand-written loop's, in microseconds."""
SWEEP = {"logged values": (0, 1, 2, 5, 10, 20), "callbacks": (0, 1, 2, 5, 10, 20, 40)}
EPOCHS = (1, 4, 16, 64, 256)


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
        self.steps = steps
        self._before, self._timed, self._after = (
            batches[:warmup],
            batches[warmup : warmup + steps],
            batches[warmup + steps :],
        )
        self._seconds: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._before) + len(self._timed) + len(self._after)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._before
        wall, cpu = time.perf_counter(), time.process_time()
        yield from self._timed
        self._seconds = time.perf_counter() - wall, time.process_time() - cpu
        yield from self._after

    def take(self) -> dict[str, float]:
        """Microseconds a step of the last pass; a pass is read once, so no figure can be a stale one."""
        seconds, self._seconds = self._seconds, None
        if seconds is None:
            raise RuntimeError("the batches were not all used, so there is no time to report")
        return {"wall": seconds[0] / self.steps * 1e6, "cpu": seconds[1] / self.steps * 1e6}


Program = Callable[[TimedBatches], object]


def model_by_hand() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def train_by_hand(batches: TimedBatches) -> None:
    """The loop that every ratio of training refers to."""
    model, optimizer = model_by_hand()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accumulate_by_hand(batches: TimedBatches) -> None:
    model, optimizer = model_by_hand()
    for index, (x, y) in enumerate(batches):
        loss = F.cross_entropy(model(x), y) / ACCUMULATE
        loss.backward()
        if index % ACCUMULATE == ACCUMULATE - 1:
            optimizer.step()
            optimizer.zero_grad()


def clip_by_hand(batches: TimedBatches) -> None:
    model, optimizer = model_by_hand()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def validate_by_hand(batches: TimedBatches) -> None:
    model, _ = model_by_hand()
    model.eval()
    with torch.inference_mode():
        for x, _ in batches:
            model(x)


def predict_by_hand(batches: TimedBatches) -> list[Tensor]:
    model, _ = model_by_hand()
    model.eval()
    outputs = []
    with torch.inference_mode():
        for x, _ in batches:
            outputs.append(model(x))
    return outputs


def make_module(pl: Any, logs: int) -> Any:
    """The same LightningModule of whichever package; `logs` values are logged in a training step."""

    class Net(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.layer(batch[0])

        def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self.layer(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.layer(x), y)

    class Logging(Net):
        names = [f"value_{index}" for index in range(logs)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.layer(x), y)
            for name in self.names:
                self.log(name, loss)
            return loss

    class LoggingBoth(Net):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.layer(x), y)
            self.log("loss", loss, prog_bar=True)
            self.log("again", loss)
            return loss

    torch.manual_seed(0)
    return Net() if logs == 0 else LoggingBoth() if logs == -1 else Logging()


def make_callbacks(pl: Any, count: int) -> list[Any]:
    class Counts(pl.Callback):  # type: ignore[misc]
        """What callbacks do at least: something, at a batch's start and at its end."""

        def __init__(self) -> None:
            self.seen = 0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen += 1

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen += 1

    return [Counts() for _ in range(count)]


def trainer_of(package: str, **options: Any) -> Any:
    """A Trainer of either package with everything that can be left out left out."""
    bare = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return importlib.import_module(package).Trainer(**{**bare, **options})


def fit(package: str, logs: int = 0, callbacks: int = 0, **options: Any) -> Program:
    """A training by `package`'s Trainer."""
    pl = importlib.import_module(package)

    def train(batches: TimedBatches) -> None:
        trainer_of(package, callbacks=make_callbacks(pl, callbacks), **options).fit(make_module(pl, logs), batches)

    return train


def fit_with_everything(package: str) -> Program:
    """What many people's training has: bar, two loggers, a checkpoint per epoch, three callbacks, two logged values."""
    pl = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")
    callbacks = importlib.import_module(f"{package}.callbacks")

    def train(batches: TimedBatches) -> None:
        with tempfile.TemporaryDirectory() as folder, terminal():
            trainer = trainer_of(
                package,
                logger=[loggers.CSVLogger(folder), loggers.TensorBoardLogger(folder)],
                callbacks=[callbacks.ModelCheckpoint(every_n_epochs=1), *make_callbacks(pl, 3)],
                enable_checkpointing=True,
                enable_progress_bar=True,
                enable_model_summary=True,
                default_root_dir=folder,
            )
            trainer.fit(make_module(pl, -1), batches)

    return train


@contextmanager
def terminal() -> Iterator[None]:
    """Output goes to a terminal of 100 columns that nobody sees: a bar is drawn as for a person."""
    sys.stdout.flush(), sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    master, slave = os.openpty()
    with subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as reader:
        os.close(master)
        os.dup2(slave, 1), os.dup2(slave, 2)
        os.close(slave)
        columns = os.environ.get("COLUMNS")
        os.environ["COLUMNS"] = "100"
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, kept in zip((1, 2), before, strict=True):
                os.dup2(kept, number)
                os.close(kept)
            if columns is None:
                del os.environ["COLUMNS"]
            reader.terminate()


def validate(package: str) -> Program:
    pl = importlib.import_module(package)
    return lambda batches: trainer_of(package).validate(make_module(pl, 0), batches, verbose=False)


def predict(package: str) -> Program:
    pl = importlib.import_module(package)
    return lambda batches: trainer_of(package).predict(make_module(pl, 0), batches)


def train_with_accelerate(batches: TimedBatches) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*model_by_hand())
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()


def train_with_ignite(batches: TimedBatches) -> None:
    from ignite.engine import create_supervised_trainer

    model, optimizer = model_by_hand()
    create_supervised_trainer(model, optimizer, F.cross_entropy).run(batches, max_epochs=1)


def make_programs(rivals: list[str]) -> dict[str, dict[str, Program]]:
    """What is measured: by kind, and by the name it has in the table. The first of a kind is the hand-written loop."""
    packages = ["lightlite", *(["pytorch_lightning"] if "pytorch-lightning" in rivals else [])]
    named = {package: package.replace("_", "-") for package in packages}
    train: dict[str, Program] = {BY_HAND: train_by_hand, "lightlite": fit("lightlite")}
    train |= {f"lightlite, {count} log{'s' * (count > 1)}": fit("lightlite", logs=count) for count in (1, 5)}
    train |= {f"lightlite, {count} callbacks": fit("lightlite", callbacks=count) for count in (5, 20)}
    train["lightlite, everything on"] = fit_with_everything("lightlite")
    if "pytorch-lightning" in rivals:
        train["pytorch-lightning"] = fit("pytorch_lightning")
        train["pytorch-lightning, 1 log"] = fit("pytorch_lightning", logs=1)
        train["pytorch-lightning, everything on"] = fit_with_everything("pytorch_lightning")
    if "accelerate" in rivals:
        train["accelerate"] = train_with_accelerate
    if "pytorch-ignite" in rivals:
        train["pytorch-ignite"] = train_with_ignite
    return {
        "train": train,
        f"accumulate {ACCUMULATE}": {
            BY_HAND: accumulate_by_hand,
            **{named[package]: fit(package, accumulate_grad_batches=ACCUMULATE) for package in packages},
        },
        "clip": {
            BY_HAND: clip_by_hand,
            **{named[package]: fit(package, gradient_clip_val=CLIP) for package in packages},
        },
        "validate": {BY_HAND: validate_by_hand, **{named[package]: validate(package) for package in packages}},
        "predict": {BY_HAND: predict_by_hand, **{named[package]: predict(package) for package in packages}},
    }


def timed(program: Program, batches: TimedBatches) -> Variant:
    """The program as something that measures itself."""

    def measure() -> dict[str, float]:
        program(batches)
        return batches.take()

    return measure


def bars_of(kind: str, figures: Figures) -> list[Bar]:
    """What is held of one kind."""
    rows = compare(figures, "wall")
    if kind == "train":
        return [Bar(f"{name}, to {BY_HAND}", rows[name].ratio, bound) for name, bound in RATIOS.items()]
    if kind in MORE:
        more = rows["lightlite"].median - rows[BY_HAND].median
        return [Bar(f"{kind}, per batch over {BY_HAND}", more, MORE[kind], "us")]
    return []


def sweep(batches: TimedBatches, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Microseconds a step over a range of logged values and callbacks, and an epoch over a range of epochs."""
    programs: dict[tuple[str, int], Variant] = {}
    for count in SWEEP["logged values"]:
        programs["logged values", count] = timed(fit("lightlite", logs=count), batches)
    for count in SWEEP["callbacks"]:
        programs["callbacks", count] = timed(fit("lightlite", callbacks=count), batches)
    for count in EPOCHS:
        programs["epochs", count] = epochs(count)
    figures = in_turns({f"{kind}, {count}": measure for (kind, count), measure in programs.items()}, rounds)
    found: dict[str, dict[int, list[float]]] = {}
    for kind, count in programs:
        found.setdefault(kind, {})[count] = figures[f"{kind}, {count}"]["wall"]
    return found


def epochs(count: int) -> Variant:
    """Microseconds an epoch of 10 batches, from the first batch to the end of the fit."""
    batches = list(TimedBatches(0, 10))[:10]

    class Clock(importlib.import_module("lightlite").Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    def measure() -> dict[str, float]:
        clock = Clock()
        trainer_of("lightlite", max_epochs=count, callbacks=[clock]).fit(
            make_module(importlib.import_module("lightlite"), 1), batches
        )
        return {"wall": clock.seconds / count * 1e6}

    return measure


def report_sweep(found: dict[str, dict[int, list[float]]]) -> None:
    """A line a point: the median, and what each further one costs over the point before."""
    for kind, points in found.items():
        print(f"\n{kind:<16}{'us':>10}{'each further':>14}")
        before = None
        for count, values in points.items():
            middle = sorted(values)[len(values) // 2]
            each = "" if before is None or kind == "epochs" else f"{(middle - before[1]) / (count - before[0]):14.2f}"
            print(f"{count:<16}{middle:10.1f}{each}")
            before = count, middle


def paint_sweep(axes: list[Any], found: dict[str, dict[int, list[float]]]) -> None:
    for one, (kind, points) in zip(axes, found.items(), strict=True):
        medians = [sorted(values)[len(values) // 2] for values in points.values()]
        one.plot(list(points), medians, marker="o")
        one.set_xlabel(kind)
        one.set_ylabel("microseconds per epoch" if kind == "epochs" else "microseconds per step")
        one.set_ylim(bottom=0)
        if kind == "epochs":
            one.set_xscale("log")


def main() -> int:
    parser = make_parser(__doc__, rounds=40)
    parser.add_argument("--steps", type=positive, default=1000, help="timed batches per turn (default: 1000)")
    parser.add_argument("--warmup", type=int, default=100, help="batches before the clock starts (default: 100)")
    parser.add_argument("--rivals", action="store_true", help="measure the other trainers that are installed, too")
    parser.add_argument("--only", metavar="KIND", help="one kind: train, accumulate, clip, validate, predict")
    parser.add_argument("--sweep", action="store_true", help="instead: how cost grows with logs, callbacks, epochs")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # what the trainers say of themselves, once per fit
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    machine = describe_machine()
    print_machine(machine)
    print(f"Linear({FEATURES}, {CLASSES}), batch {BATCH_SIZE}, SGD, 1 thread; {arguments.rounds} rounds in turns, "
          f"{arguments.steps} batches each")  # fmt: skip
    batches = TimedBatches(arguments.warmup, arguments.steps)
    if arguments.sweep:
        found = sweep(batches, arguments.rounds)
        report_sweep(found)
        write_json(arguments.json, machine, arguments, microseconds=found)
        draw(arguments.plot, lambda axes: paint_sweep(axes, found), columns=len(found))
        return 0
    everything: dict[str, Figures] = {}
    bars: list[Bar] = []
    for kind, programs in make_programs(installed_rivals() if arguments.rivals else []).items():
        if arguments.only and not kind.startswith(arguments.only):
            continue
        figures = in_turns({name: timed(program, batches) for name, program in programs.items()}, arguments.rounds)
        print_table(f"{kind}, us per batch", compare(figures, "wall"))
        print_table(f"{kind}, by CPU time", compare(figures, "cpu"))
        everything[kind] = figures
        bars += bars_of(kind, figures)
    held = print_bars(bars)
    write_json(arguments.json, machine, arguments, microseconds=everything, bars=bars)

    def paint(axes: Any) -> None:
        for one, (kind, figures) in zip(axes if len(everything) > 1 else [axes], everything.items(), strict=True):
            paint_rows(one, f"{kind}: microseconds per batch", compare(figures, "wall"))

    draw(arguments.plot, paint, columns=len(everything))
    return 1 if arguments.strict and not held else 0


if __name__ == "__main__":
    sys.exit(main())
