"""What must be equal of what two runs of a program left behind."""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Set
from operator import getitem
from pathlib import Path
from typing import Any

import torch
import yaml

CLOSE = {"rel_tol": 1e-5, "abs_tol": 1e-7}
"""For values reduced over an epoch, whose sums lightlite keeps in double precision."""

EXACT = ("weights", "state_dict", "optimizer_state", "predict", "again", "drawn")
"""Where numbers are equal to the bit: under keys that hold one of these."""

FREE = {"lightlite", "pytorch-lightning_version", "timeout", "stopping_reason_message", "time_elapsed"}
"""Keys under which anything may stand: what only lightlite has or takes, texts, and clocks."""

POSITION = (
    ("epoch_progress", "current"),
    ("epoch_loop.batch_progress", "current", "processed"),
    ("epoch_loop.batch_progress", "current", "completed"),
    ("epoch_loop.batch_progress", "is_last_batch"),
    ("epoch_loop.state_dict", "_batches_that_stepped"),
)
"""Of Lightning's counters in a checkpoint: those that say where training stands."""


def differences(theirs: Path, ours: Path, free: Collection[str] = ()) -> list[str]:
    """Everything in which two folders differ, a line each; nothing where all is well.

    Args:
        theirs: What a program wrote under Lightning.
        ours: What it wrote under lightlite.
        free: Keys under which anything may stand, beside those under which it always may.
    """
    names_theirs, names_ours = _files(theirs), _files(ours)
    found = [f"only Lightning writes {name}" for name in sorted(names_theirs - names_ours)]
    found += [f"only lightlite writes {name}" for name in sorted(names_ours - names_theirs)]
    for name in sorted(names_theirs & names_ours):
        if Path(name).suffix in READERS:
            contents = [read(folder / name, folder) for folder in (theirs, ours)]
            found += [f"{name}: {line}" for line in unequal(*contents, FREE | set(free))]
    return found


def read(path: Path, folder: Path) -> Any:
    """What a file holds, without the folder in which the program ran."""
    return _without(READERS[path.suffix](path), str(folder))


def unequal(theirs: Any, ours: Any, free: Set[str] = FREE, where: str = "") -> Iterator[str]:
    """Where two nests differ."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        a, b = theirs.keys() - free, ours.keys() - free
        if a != b:
            yield f"{where} has the keys {a - b} under Lightning only, {b - a} under lightlite only"
        for key in (key for key in theirs if key in a & b):
            yield from unequal(theirs[key], ours[key], free, f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        if len(theirs) != len(ours):
            yield f"{where} has length {len(theirs)} under Lightning, {len(ours)} under lightlite"
        for index, (a, b) in enumerate(zip(theirs, ours, strict=False)):
            yield from unequal(a, b, free, f"{where}[{index}]")
    elif not _same(theirs, ours, exact=any(word in where for word in EXACT)):
        yield f"{where} is {theirs!r} under Lightning, {ours!r} under lightlite"


def _same(theirs: Any, ours: Any, exact: bool) -> bool:
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        if theirs.shape != ours.shape or (theirs.dtype != ours.dtype and exact):
            return False
        if exact:
            return torch.equal(theirs, ours)
        return torch.allclose(theirs.double(), ours.double(), rtol=CLOSE["rel_tol"], atol=CLOSE["abs_tol"])
    if isinstance(theirs, (float, torch.Tensor)) and isinstance(ours, (float, torch.Tensor)) and not exact:
        return math.isclose(float(theirs), float(ours), **CLOSE)
    return type(theirs) is type(ours) and bool(theirs == ours)


def _files(folder: Path) -> set[str]:
    """All files below a folder; TensorBoard's, which are named after time, machine and process, without that."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"tfevents\..*", "tfevents", name) for name in names}


def _saved(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def _metrics(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _settings(path: Path) -> Any:
    return yaml.load(path.read_text(), yaml.BaseLoader)


def _checkpoint(path: Path) -> dict[str, Any]:
    """Everything that Lightning keeps in a checkpoint, its counters as far as they decide where training goes on."""
    content = dict(_saved(path))
    if "loops" in content:
        content["loops"] = [functools.reduce(getitem, path, content["loops"]["fit_loop"]) for path in POSITION]
    return content


def _without(nest: Any, folder: str) -> Any:
    if isinstance(nest, str):
        return nest.replace(folder, "").replace("pytorch_lightning.", "lightlite.")
    if isinstance(nest, dict):
        return {_without(key, folder): _without(value, folder) for key, value in nest.items()}
    return [_without(value, folder) for value in nest] if isinstance(nest, list) else nest


READERS = {".pt": _saved, ".csv": _metrics, ".yaml": _settings, ".ckpt": _checkpoint}
