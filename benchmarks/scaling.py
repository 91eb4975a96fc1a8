"""How training scales over devices: lightlite beside raw DistributedDataParallel, at every number of them.

    python benchmarks/scaling.py --devices 1 2 4 --accelerator cpu --model mlp --mode weak
    python benchmarks/scaling.py --devices 1 2 4 8 --accelerator cuda --model gpt --mode strong --plot scaling.png

Each figure is of a run of its own, by lightlite's launcher or by torchrun; the two take turns. Within a run the clock
is read on rank zero, around `--steps` steps after `--warmup` others. The data is made in advance.

weak: every rank gets `--batch-size` samples a step, so that the work grows with the devices.
strong: all ranks together get `--batch-size`, so that each one's work shrinks.

sync is the share of a step that is gone when gradients are not brought together: what devices wait for one another, and
not what goes on behind the backward pass. Utilisation, memory and power are the accelerator's figures of rank zero's
device and process. More ranks than cores share them, and cannot be faster: they are marked with *.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
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
    make_parser,
    positive,
    print_bars,
    print_machine,
    write_json,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

RAW, LIGHTLITE = "raw DDP", "lightlite"
LEAST = 0.98
"""What lightlite's throughput may be at least, to raw DDP's, on two ranks."""
RESULT = "RESULT "


class Block(nn.Module):
    """A layer of a small GPT: causal attention and a perceptron, each after normalization and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.perceptron(self.before_perceptron(x))


class GPT(nn.Module):
    """About a million parameters; the next of 64 tokens is predicted at each of 64 places."""

    LENGTH, TOKENS = 64, 64

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(self.TOKENS, width), nn.Embedding(self.LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, self.TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.blocks(self.tokens(x) + self.places(places))).transpose(1, 2)


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    if name == "convnet":
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
    return GPT()


def make_data(name: str, samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    if name == "gpt":
        tokens = torch.randint(GPT.TOKENS, (samples, GPT.LENGTH + 1), generator=generator)
        return TensorDataset(tokens[:, :-1], tokens[:, 1:])
    shape = (784,) if name == "mlp" else (3, 32, 32)
    return TensorDataset(
        torch.randn(samples, *shape, generator=generator), torch.randint(10, (samples,), generator=generator)
    )


MODELS = ("mlp", "convnet", "gpt")


class Clock:
    """Times the steps after the warm-up on one rank; then the same number without gradient sync.

    Args:
        accelerator: Registered name.
        device: This rank's.
        warmup: Steps before the first timed one.
        steps: Timed steps, of either kind.
        samples: In a step, over all ranks.
    """

    def __init__(self, accelerator: str, device: torch.device, warmup: int, steps: int, samples: int) -> None:
        from lightlite.accelerators import AcceleratorRegistry

        self.accelerator, self.device = AcceleratorRegistry.create(accelerator), device
        self.marks = {warmup, warmup + steps, warmup + 2 * steps}
        self.without_sync = range(warmup + steps, warmup + 2 * steps)
        self.steps, self.samples = steps, samples
        self.times: list[float] = []
        self.stats: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Step number `step` begins, or would, after the last one."""
        if step not in self.marks:
            return
        self.accelerator.synchronize(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) < 3:  # what is used is counted from the first of these calls to the second
            self.stats = self.accelerator.get_device_stats(self.device)

    def result(self) -> dict[str, float]:
        """Samples a second, the share of sync, and the accelerator's figures."""
        first, second, third = self.times
        share = max(0.0, 1 - (third - second) / (second - first))
        return {"samples/s": self.samples * self.steps / (second - first), "sync": share, **self.stats}


def train_raw(arguments: argparse.Namespace) -> dict[str, float]:
    """The loop that one would write by hand, on the ranks that torchrun has started."""
    import torch.distributed as dist

    rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu" if arguments.accelerator == "cpu" else f"{arguments.accelerator}:{local}")
    model: nn.Module = make_model(arguments.model[0]).to(device)
    wrapped: Any = model
    if ranks > 1:
        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters())
    clock = clock_of(arguments, device, ranks)
    data = make_data(arguments.model[0], samples_in_all(arguments, ranks))
    sampler = DistributedSampler(data, ranks, rank, shuffle=False) if ranks > 1 else None
    loader = DataLoader(data, per_rank(arguments, ranks), sampler=sampler, pin_memory=device.type == "cuda")
    step = 0
    for step, (x, y) in enumerate(loader):
        clock.before(step)
        apart = ranks > 1 and step in clock.without_sync
        context: AbstractContextManager[Any] = wrapped.no_sync() if apart else nullcontext()
        with context:
            loss = nn.functional.cross_entropy(
                wrapped(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)
            )
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    clock.before(step + 1)
    if ranks > 1:
        dist.destroy_process_group()
    return clock.result() if rank == 0 else {}


def train_lightlite(arguments: argparse.Namespace) -> dict[str, float]:
    """The same by lightlite's Trainer, on the ranks that its launcher has started."""
    import lightlite as pl

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(arguments.model[0])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    class Timed(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.clock = clock_of(arguments, trainer.strategy.root_device, trainer.world_size)
            self.apart: Any = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.clock.before(batch_idx)
            if batch_idx in self.clock.without_sync:
                self.apart = trainer.strategy.no_sync()
                self.apart.__enter__()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.apart is not None:
                self.apart.__exit__(None, None, None)
                self.apart = None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.clock.before(max(self.clock.marks))

    timed = Timed()
    trainer = pl.Trainer(
        accelerator=arguments.accelerator, devices="auto", max_epochs=1, logger=False, callbacks=[timed],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    ranks = trainer.world_size
    data = make_data(arguments.model[0], samples_in_all(arguments, ranks))
    trainer.fit(Net(), DataLoader(data, per_rank(arguments, ranks)))
    return timed.clock.result() if trainer.is_global_zero else {}


def per_rank(arguments: argparse.Namespace, ranks: int) -> int:
    """Samples of a step on one rank."""
    return int(arguments.batch_size) if arguments.mode == "weak" else max(1, arguments.batch_size // ranks)


def samples_in_all(arguments: argparse.Namespace, ranks: int) -> int:
    return ranks * per_rank(arguments, ranks) * (arguments.warmup + 2 * arguments.steps)


def clock_of(arguments: argparse.Namespace, device: torch.device, ranks: int) -> Clock:
    samples = ranks * per_rank(arguments, ranks)
    return Clock(arguments.accelerator, device, arguments.warmup, arguments.steps, samples)


def run_of(way: str, ranks: int, model: str, arguments: argparse.Namespace) -> Variant:
    """One run, as something that measures itself."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if way == LIGHTLITE:
        launch = ["-m", "lightlite.launch", "--accelerator", arguments.accelerator, "--devices", str(ranks)]
    settings = [
        "--worker", way, "--accelerator", arguments.accelerator, "--model", model, "--mode", arguments.mode,
        "--batch-size", str(arguments.batch_size), "--steps", str(arguments.steps), "--warmup", str(arguments.warmup),
    ]  # fmt: skip
    # Each rank's share of the cores, for both ways alike: torchrun would leave one thread to each.
    threads = max(1, describe_cores() // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}

    def measure() -> dict[str, float]:
        command = [sys.executable, *launch, str(Path(__file__).resolve()), *settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if RESULT in line]
        if done.returncode or not lines:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-3000:]}")
        result: dict[str, float] = json.loads(lines[0].partition(RESULT)[2])
        return result

    return measure


def describe_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SHOWN = {
    "util %": ("utilization_percent", 1.0),
    "process %": ("process_utilization_percent", 1.0),
    "memory MB": ("process_memory_bytes", 1e-6),
    "power W": ("power_watts", 1.0),
}
"""Columns for the accelerator's figures, where it has them: what each is called there, and times what."""


def report(model: str, mode: str, by_ranks: dict[int, Figures]) -> list[Bar]:
    """Print one model's table; returns what is held."""
    first = min(by_ranks)
    named = {name for figures in by_ranks.values() for name in figures[LIGHTLITE]}
    columns = {title: place for title, place in SHOWN.items() if place[0] in named}
    print(f"\n{model}, {mode} scaling")
    print(f"{'ranks':<7}{'':<11}{'samples/s':>11}{'min':>10}{'max':>10}{'speed-up':>10}{'efficiency':>12}{'to raw':>8}"
          f"{'sync %':>8}" + "".join(f"{title:>11}" for title in columns))  # fmt: skip
    for ranks, figures in by_ranks.items():
        rows = compare(figures, "samples/s", RAW)
        for way, row in rows.items():
            speed_up = row.median / statistics.median(by_ranks[first][way]["samples/s"]) * first
            more = [
                f"{statistics.median(figures[way][key]) * factor:11.1f}" if key in figures[way] else f"{'':>11}"
                for key, factor in columns.values()
            ]
            mark = "*" if ranks > describe_cores() else ""
            print(f"{f'{ranks}{mark}':<7}{way:<11}{row.median:11.1f}{row.least:10.1f}{row.most:10.1f}{speed_up:10.2f}"
                  f"{speed_up / ranks:12.2f}{row.ratio:8.3f}{100 * statistics.median(figures[way]['sync']):8.1f}"
                  + "".join(more))  # fmt: skip
    if 2 not in by_ranks or model == "mlp":
        return []
    ratio = compare(by_ranks[2], "samples/s", RAW)[LIGHTLITE].ratio
    return [Bar(f"{model}: samples/s on two ranks, to raw DDP", ratio, LEAST, at_least=True)]


def paint(axes: Any, model: str, by_ranks: dict[int, Figures]) -> None:
    first = min(by_ranks)
    for way, style in ((RAW, "tab:gray"), (LIGHTLITE, "tab:blue")):
        base = statistics.median(by_ranks[first][way]["samples/s"]) / first
        speed_ups = [statistics.median(figures[way]["samples/s"]) / base for figures in by_ranks.values()]
        axes.plot(list(by_ranks), speed_ups, marker="o", color=style, label=way)
    axes.plot(list(by_ranks), list(by_ranks), linestyle="--", color="black", label="ideal")
    axes.axvspan(describe_cores() + 0.5, max(*by_ranks, describe_cores()) + 0.5, alpha=0.1, color="black")
    axes.set_xlim(first - 0.2, max(by_ranks) + 0.2)
    axes.set_xticks(list(by_ranks))
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up")
    axes.set_title(model)
    axes.legend()


def choose_accelerator(name: str) -> str:
    """ "auto" as the first that is here."""
    from lightlite.accelerators import AcceleratorRegistry

    order = AcceleratorRegistry.groups.get(name, (name,))
    found = next((one for one in order if AcceleratorRegistry.get(one).is_available()), None)
    if found is None:
        sys.exit(f"--accelerator {name}: there is none here; available: {', '.join(AcceleratorRegistry.available())}")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--devices", type=positive, nargs="+", default=[1, 2, 4], help="ranks (default: 1 2 4)")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, another registered name, or auto (default)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["convnet"], help="(default: convnet)")
    parser.add_argument("--mode", choices=("weak", "strong"), default="weak", help="(default: weak)")
    parser.add_argument("--batch-size", type=positive, default=32, help="samples, see above (default: 32)")
    parser.add_argument("--steps", type=positive, default=60, help="timed steps of a run (default: 60)")
    parser.add_argument("--warmup", type=positive, default=10, help="steps before them (default: 10)")
    parser.add_argument("--worker", choices=(RAW, LIGHTLITE), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker:
        result = train_raw(arguments) if arguments.worker == RAW else train_lightlite(arguments)
        if result:
            print(RESULT + json.dumps(result), flush=True)
        return 0
    arguments.accelerator = choose_accelerator(arguments.accelerator)
    machine = describe_machine()
    print_machine(machine)
    print(f"{arguments.accelerator}, batch {arguments.batch_size}, AdamW; {arguments.rounds} rounds in turns, "
          f"{arguments.steps} steps each; * more ranks than cores")  # fmt: skip
    everything: dict[str, dict[int, Figures]] = {}
    bars: list[Bar] = []
    for model in arguments.model:
        everything[model] = {
            ranks: in_turns(
                {way: run_of(way, ranks, model, arguments) for way in (RAW, LIGHTLITE)}, arguments.rounds, warmup=0
            )
            for ranks in sorted(set(arguments.devices))
        }
        bars += report(model, arguments.mode, everything[model])
    held = print_bars(bars)
    write_json(arguments.json, machine, arguments, figures=everything, bars=bars)
    draw(
        arguments.plot,
        lambda axes: [
            paint(one, model, by_ranks)
            for one, (model, by_ranks) in zip(axes if len(everything) > 1 else [axes], everything.items(), strict=True)
        ],
        columns=len(everything),
    )
    return 1 if arguments.strict and not held else 0


if __name__ == "__main__":
    sys.exit(main())
