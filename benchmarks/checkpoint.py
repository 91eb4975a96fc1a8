"""What a checkpoint costs: how long a save stops training, and how long it takes until the file is on disk.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --megabytes 1 10 100 1000 --rivals --plot checkpoint.png

A module of so many megabytes is saved from within a fit, at the end of each of three batches; the third save counts,
for training saves many times. The ways take turns. `stops` is how long the call takes, `whole` how long until the file
bears its name. The reference is `torch.save` of the module's state_dict, which does not wait for the disk; lightlite
does, and keeps checksums, so that a kill or a power cut leaves a whole file.
"""

from __future__ import annotations

import importlib
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
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
    positive,
    print_bars,
    print_machine,
    print_table,
    write_json,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

REFERENCE, SYNC, ASYNC = "torch.save", "lightlite", "lightlite, async"
MOST_OF_SYNC = 0.15
"""The most that an async save may stop training, as a multiple of the synchronous one, at this size or above."""
LARGE = 500
LAYERS, SAVES = 8, 3


class Saves:
    """Saves at a batch's end, and times it; the figures are those of the last save."""

    def __init__(self, way: str, path: str) -> None:
        self.way, self.path = way, path
        self.figures: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, module: nn.Module, *_: Any) -> None:
        start = time.perf_counter()
        if self.way == REFERENCE:
            torch.save(module.state_dict(), self.path)
        else:
            trainer.save_checkpoint(self.path)
        self.figures["stops"] = time.perf_counter() - start
        if self.way == ASYNC:
            trainer.strategy.checkpoint_io.wait()
        self.figures["whole"] = time.perf_counter() - start


def make_module(pl: Any, megabytes: int) -> Any:
    class Large(pl.LightningModule):  # type: ignore[misc]
        """Its state is that large; one parameter of it is trained, by SGD, which has no state of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.trained = nn.Parameter(torch.zeros(1))
            self.rest = nn.ParameterList(
                nn.Parameter(torch.randn(megabytes * 10**6 // 4 // LAYERS), requires_grad=False) for _ in range(LAYERS)
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.trained * batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.trained], lr=0.1)

    return Large()


def saving(way: str, package: str, megabytes: int, folder: str) -> Variant:
    """One fit that saves, as something that measures itself."""
    pl = importlib.import_module(package)
    path = os.path.join(folder, f"{way}.ckpt".replace(", ", "-"))

    def measure() -> dict[str, float]:
        saves = Saves(way, path)

        class Hook(pl.Callback):  # type: ignore[misc,name-defined]
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
                saves.on_train_batch_end(trainer, pl_module, *rest)

        plugins = [importlib.import_module("lightlite.plugins.io").AsyncCheckpointIO()] if way == ASYNC else None
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, plugins=plugins,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Hook()], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(make_module(pl, megabytes), DataLoader(torch.ones(SAVES, 1)))
        os.remove(path)
        return saves.figures

    return measure


def main() -> int:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--megabytes", type=positive, nargs="+", default=[1, 10, 100, 500, 1000],
                        help="(default: 1 10 100 500 1000)")  # fmt: skip
    parser.add_argument("--folder", help="where to save; a new temporary folder by default")
    parser.add_argument("--rivals", action="store_true", help="measure pytorch-lightning, if it is installed, too")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    machine = describe_machine()
    print_machine(machine)
    ways = {REFERENCE: "lightlite", SYNC: "lightlite", ASYNC: "lightlite"}
    if arguments.rivals and "pytorch-lightning" in installed_rivals():
        ways["pytorch-lightning"] = "pytorch_lightning"
    everything: dict[int, Figures] = {}
    bars: list[Bar] = []
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            variants = {way: saving(way, package, megabytes, folder) for way, package in ways.items()}
            figures = everything[megabytes] = in_turns(variants, arguments.rounds)
        for what in ("stops", "whole"):
            print_table(f"{megabytes} MB, {what}, s", compare(figures, what), digits=4)
        if megabytes >= LARGE:
            ratio = compare(figures, "stops", SYNC)[ASYNC].ratio
            bars.append(Bar(f"{megabytes} MB: async stops training, to synchronous", ratio, MOST_OF_SYNC))
    held = print_bars(bars)
    write_json(arguments.json, machine, arguments, seconds=everything, bars=bars)

    def paint(axes: list[Any]) -> None:
        for one, what in zip(axes, ("stops", "whole"), strict=True):
            for way in ways:
                medians = [statistics.median(figures[way][what]) for figures in everything.values()]
                one.plot(list(everything), medians, marker="o", label=way)
            one.set_xscale("log")
            one.set_yscale("log")
            one.set_xlabel("megabytes")
            one.set_ylabel(f"{what}, seconds")
            one.legend()

    draw(arguments.plot, paint, columns=2)
    return 1 if arguments.strict and not held else 0


if __name__ == "__main__":
    sys.exit(main())
