"""What importing costs beside torch, and how long it takes from a command to the first optimizer step.

    python benchmarks/startup.py
    python benchmarks/startup.py --devices 2 --rivals --json startup.json --plot startup.png

Every figure is of a process of its own; the ways to train take turns. The clock of a training starts right before its
command does, and stops in rank zero when the first optimizer step is done. The reference is torchrun with a script on
torch.nn.parallel.DistributedDataParallel that knows no trainer; on one rank it is that script under plain Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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

RAW = """
import os, time
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

ranks = int(os.environ.get("WORLD_SIZE", "1"))
model = nn.Linear(32, 2)
data = TensorDataset(torch.randn(64, 32), torch.randint(2, (64,)))
sampler = None
if ranks > 1:
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(model)
    sampler = DistributedSampler(data)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for x, y in DataLoader(data, batch_size=8, sampler=sampler):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    break
if os.environ.get("RANK", "0") == "0":
    print("FIRST STEP", time.time(), flush=True)
os._exit(0)  # what comes after is not measured, and gloo's threads abort now and then where a group is destroyed
"""

TRAINER = """
import time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import {package} as pl

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

class Clock(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            print("FIRST STEP", time.time(), flush=True)

def main():
    data = TensorDataset(torch.randn(64, 32), torch.randint(2, (64,)))
    for call in range({calls}):
        print("CALL", time.time(), flush=True)
        trainer = pl.Trainer(
            accelerator="cpu", devices={devices}, strategy={strategy!r}, max_steps=1, logger=False,
            callbacks=[Clock()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(Net(), DataLoader(data, batch_size=8))

if __name__ == "__main__":
    main()
"""

IMPORT = """
import sys, time
import psutil
{before}
process = psutil.Process()
memory, start = process.memory_info().rss, time.perf_counter()
import {package}
print("SECONDS", time.perf_counter() - start, "BYTES", process.memory_info().rss - memory)
"""

RAW_BY_TORCHRUN = "torchrun, raw DDP"
COMMAND, IN_SCRIPT = "lightlite, python -m lightlite.launch", "lightlite, in the script"


def run(command: list[str], folder: Path, has_to_print: str = "") -> str:
    """What a command prints. Compiled modules are kept, as in an installed package.

    It has to succeed, unless it has printed what it has to: how it ends is not measured then.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not (has_to_print and has_to_print in done.stdout):
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def to_first_step(command: list[str], folder: Path, has_to_end_well: bool) -> Variant:
    """Seconds from a command to the first step. Gloo aborts now and then where others leave their process group."""

    def measure() -> dict[str, float]:
        started = time.time()
        printed = run(command, folder, "" if has_to_end_well else "FIRST STEP")
        steps = re.findall(r"FIRST STEP ([\d.]+)", printed)
        return {"first step": float(steps[0]) - started}

    return measure


def later_calls(script: str, folder: Path) -> Variant:
    """Seconds from a call of the Trainer to its first step, for each of three in one script."""

    def measure() -> dict[str, float]:
        printed = run([sys.executable, script], folder)
        calls = [float(t) for t in re.findall(r"CALL ([\d.]+)", printed)]
        steps = [float(t) for t in re.findall(r"FIRST STEP ([\d.]+)", printed)]
        return {f"call {i + 1}": step - call for i, (call, step) in enumerate(zip(calls, steps, strict=True))}

    return measure


def importing(package: str, beyond: str) -> Variant:
    """Seconds and megabytes that an import takes once another one is there."""
    code = IMPORT.format(package=package, before=f"import {beyond}" if beyond else "")

    def measure() -> dict[str, float]:
        seconds, size = re.findall(
            r"SECONDS (\S+) BYTES (\S+)", run([sys.executable, "-c", code], Path(tempfile.gettempdir()))
        )[0]
        return {"seconds": float(seconds), "MB": float(size) / 1e6}

    return measure


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def ways_to_train(ranks: int, folder: Path, rivals: list[str]) -> dict[str, Variant]:
    """The reference first."""

    def trainer(package: str, strategy: str, calls: int = 1) -> str:
        text = TRAINER.format(package=package, devices=ranks, strategy=strategy, calls=calls)
        return write(folder, f"{package}_{strategy}_{ranks}.py", text)

    raw = write(folder, "raw.py", RAW)
    launched, plain = f"--nproc-per-node={ranks}", [sys.executable]
    torchrun = [*plain, "-m", "torch.distributed.run", "--standalone", launched]
    launch = [*plain, "-m", "lightlite.launch", "--accelerator", "cpu", "--devices", str(ranks)]
    ways = {
        RAW_BY_TORCHRUN: [*(torchrun if ranks > 1 else plain), raw],
        COMMAND: [*launch, trainer("lightlite", "auto")],
        IN_SCRIPT: [*plain, trainer("lightlite", "auto")],
    }
    if "pytorch-lightning" in rivals:
        ways["pytorch-lightning, ddp" if ranks > 1 else "pytorch-lightning"] = [
            *plain, trainer("pytorch_lightning", "ddp" if ranks > 1 else "auto"),
        ]  # fmt: skip
        if ranks > 1:
            ways["pytorch-lightning, ddp_spawn"] = [*plain, trainer("pytorch_lightning", "ddp_spawn")]
    return {name: to_first_step(command, folder, name.startswith("lightlite")) for name, command in ways.items()}


def measure_imports(rounds: int, rivals: list[str]) -> Figures:
    packages = {"pytorch-lightning": "pytorch_lightning", "accelerate": "accelerate", "pytorch-ignite": "ignite.engine"}
    variants = {"import torch": importing("torch", ""), "lightlite": importing("lightlite", "torch")}
    variants |= {name: importing(packages[name], "torch") for name in rivals}
    return in_turns(variants, rounds)


def main() -> int:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--devices", type=positive, nargs="+", default=[1, 2, 4], help="ranks (default: 1 2 4)")
    parser.add_argument("--rivals", action="store_true", help="measure the other trainers that are installed, too")
    arguments = parser.parse_args()
    machine = describe_machine()
    print_machine(machine)
    rivals = installed_rivals() if arguments.rivals else []
    everything: dict[str, Figures] = {}
    imports = everything["import beyond torch"] = measure_imports(arguments.rounds, rivals)
    print_table("import beyond torch, s", compare(imports, "seconds"), digits=3)
    print_table("import beyond torch, MB", compare(imports, "MB"))
    bars = [
        Bar("import lightlite beyond torch", compare(imports, "seconds")["lightlite"].median, 0.15, "s"),
        Bar("import lightlite beyond torch", compare(imports, "MB")["lightlite"].median, 25, "MB"),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in arguments.devices:
            label = f"to the first step, {ranks} rank{'s' * (ranks > 1)}"
            figures = everything[label] = in_turns(ways_to_train(ranks, folder, rivals), arguments.rounds)
            rows = compare(figures, "first step")
            print_table(f"{label}, s", rows, digits=2)
            if ranks == 2:
                bars += [
                    Bar("command to first step, 2 ranks, launcher, to torchrun", rows[COMMAND].ratio, 1.10),
                    Bar("command to first step, 2 ranks, in the script, to torchrun", rows[IN_SCRIPT].ratio, 1.00),
                ]
        several = max(arguments.devices)
        ranks = 2 if 2 in arguments.devices else several
        text = TRAINER.format(package="lightlite", devices=ranks, strategy="auto", calls=3)
        calls = in_turns({"lightlite": later_calls(write(folder, "calls.py", text), folder)}, arguments.rounds)
    everything["calls of one script"] = calls
    rows = {name: compare(calls, name)["lightlite"] for name in ("call 1", "call 2", "call 3")}
    print_table(f"Trainer(devices={ranks}).fit to its first step, s", rows, digits=3)
    bars.append(Bar("second call to its first step", rows["call 2"].median, 0.3, "s"))
    held = print_bars(bars)
    write_json(arguments.json, machine, arguments, seconds=everything, bars=bars)
    shown = [label for label in everything if label.startswith("to the first step")]
    draw(
        arguments.plot,
        lambda axes: [
            paint_rows(one, f"{label}: seconds", compare(everything[label], "first step"))
            for one, label in zip(axes if len(shown) > 1 else [axes], shown, strict=True)
        ],
        columns=len(shown),
    )
    return 1 if arguments.strict and not held else 0


if __name__ == "__main__":
    sys.exit(main())
