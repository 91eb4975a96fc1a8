"""What the benchmark programs share: turns, tables, JSON, plots, and a description of the machine."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RIVALS = {
    "pytorch-lightning": "pytorch_lightning",
    "accelerate": "accelerate",
    "pytorch-ignite": "ignite",
}
"""Distributions that lightlite is measured against, and the packages they install."""

Figures = dict[str, dict[str, list[float]]]
"""By variant and by what was measured: one figure a round."""

Variant = Callable[[], Mapping[str, float]]


def installed_rivals() -> list[str]:
    """The rivals that are here; a line is printed for each that is not."""
    here = []
    for name, package in RIVALS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name} is not installed and left out; all of them: pip install 'lightlite[bench]'")
        else:
            here.append(name)
    return here


def in_turns(variants: Mapping[str, Variant], rounds: int, warmup: int = 1) -> Figures:
    """Run every variant once a round, A B C A B C, so that a machine that slows down slows all of them.

    Args:
        variants: By name; each measures itself once and returns its figures.
        rounds: How many turns each one gets.
        warmup: Further rounds before those, whose figures are thrown away.
    """
    figures: Figures = {name: {} for name in variants}
    started = time.monotonic()
    for done in range(-warmup, rounds):
        for position, (name, measure) in enumerate(variants.items()):
            _show(f"round {max(done, 0) + 1} of {rounds}, {position + 1} of {len(variants)}: {name}", started)
            gc.collect()
            for what, figure in measure().items():
                if done >= 0:
                    figures[name].setdefault(what, []).append(figure)
    _show("", started)
    return figures


def _show(text: str, started: float) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}, {time.monotonic() - started:.0f} s" if text else "\r\033[K", end="", file=sys.stderr)


@dataclass
class Row:
    """Figures of one variant, and how they compare with the reference's."""

    least: float
    median: float
    most: float
    ratio: float

    @classmethod
    def of(cls, figures: Sequence[float], reference: Sequence[float]) -> Row:
        """The median's ratio is to the reference's median."""
        median, base = statistics.median(figures), statistics.median(reference)
        return cls(min(figures), median, max(figures), median / base if base else float("nan"))


def compare(figures: Figures, what: str, reference: str | None = None) -> dict[str, Row]:
    """One row for each variant that has figures of `what`; ratios are to `reference`, by default the first of them."""
    measured = {name: per_kind[what] for name, per_kind in figures.items() if what in per_kind}
    base = measured[reference or next(iter(measured))]
    return {name: Row.of(values, base) for name, values in measured.items()}


def print_table(title: str, rows: Mapping[str, Row], digits: int = 1) -> None:
    """A table on the terminal: minimum, median, maximum, ratio of medians."""
    width = max(len(title), *(len(name) for name in rows)) + 2
    print(f"\n{title:<{width}}{'min':>10}{'median':>10}{'max':>10}{'ratio':>8}")
    for name, row in rows.items():
        numbers = "".join(f"{value:10.{digits}f}" for value in (row.least, row.median, row.most))
        print(f"{name:<{width}}{numbers}{row.ratio:8.3f}")


@dataclass
class Bar:
    """Something that is held: what was measured, and the most (or least) that it may be."""

    what: str
    value: float
    bound: float
    unit: str = "times"
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        side = "at least" if self.at_least else "at most"
        return f"{'holds' if self.holds else 'OVER ':5} {self.what}: {self.value:.3f} {self.unit}, {side} {self.bound}"


def print_bars(bars: Sequence[Bar]) -> bool:
    """A line for each; returns whether all hold."""
    print()
    for bar in bars:
        print(bar)
    return all(bar.holds for bar in bars)


def describe_machine() -> dict[str, Any]:
    """Enough to judge figures by."""
    import torch

    packages = {}
    for name, package in {"torch": "torch", "lightlite": "lightlite", **RIVALS}.items():
        if importlib.util.find_spec(package) is not None:
            packages[name] = version(name)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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


def print_machine(machine: Mapping[str, Any]) -> None:
    """Two lines above the tables."""
    load = machine["load_average"][0]
    print(f"{machine['processor']}, {machine['cores']} cores, load {load:.1f}; {machine['system']}")
    print(f"Python {machine['python']}, " + ", ".join(f"{name} {v}" for name, v in machine["packages"].items()))


def make_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what all programs take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"turns that each gets (default: {rounds})")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure and the machine's description")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a plot (PNG); needs matplotlib")
    parser.add_argument("--assert", dest="strict", action="store_true", help="exit with 1 where a bar does not hold")
    return parser


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a program was asked to do, as plain data."""
    return {name: value for name, value in vars(arguments).items() if name not in ("json", "plot", "strict")}


def write_json(path: Path | None, machine: Mapping[str, Any], arguments: argparse.Namespace, **content: Any) -> None:
    """Keep the figures, with the machine they came from; does nothing without a path."""
    if path is not None:
        everything = {"machine": machine, "settings": settings_of(arguments), **content}
        path.write_text(json.dumps(everything, indent=1, default=vars) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def draw(path: Path | None, paint: Callable[[Any], None], columns: int = 1) -> None:
    """Let `paint(axes)` draw a PNG; does nothing without a path.

    Args:
        path: Where to.
        paint: Gets one Axes, or a list of as many as there are columns.
        columns: Plots side by side.
    """
    if path is None:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'lightlite[bench]')")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(7 * columns, 4.5), squeeze=False, layout="constrained")
    paint(axes[0][0] if columns == 1 else list(axes[0]))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"wrote {path}")


def paint_rows(axes: Any, title: str, rows: Mapping[str, Row]) -> None:
    """Horizontal bars at the medians, with a line from minimum to maximum."""
    names = list(rows)
    medians = [rows[name].median for name in names]
    spread = [
        [row.median - row.least for row in rows.values()],
        [row.most - row.median for row in rows.values()],
    ]
    colours = ["tab:gray" if index == 0 else "tab:blue" if "lightlite" in name else "tab:orange"
               for index, name in enumerate(names)]  # fmt: skip
    axes.barh(names, medians, xerr=spread, color=colours, ecolor="black", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel(title)
