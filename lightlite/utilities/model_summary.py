"""What a module consists of, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightlite.utilities.seed import isolate_rng

LEFTOVER_PARAMS_NAME = "other params"
UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
_UNITS = ("", "K", "M", "B", "T")


@dataclass
class LayerSummary:
    """One line of the table.

    Attributes:
        module: The submodule.
        in_size: Shape of what its forward was given, nested as that was; "?" where it was not run.
        out_size: Shape of what its forward returned.
    """

    module: nn.Module
    in_size: Any = UNKNOWN_SIZE
    out_size: Any = UNKNOWN_SIZE

    @property
    def layer_type(self) -> str:
        """The class's name."""
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        """How many numbers its parameters are; those of lazy modules do not count before the first batch."""
        return sum(_size(parameter) for parameter in self.module.parameters())

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return self.module.training

    def watch(self) -> Any:
        """Note the sizes at the next forward; returns the hook's handle."""

        def note(_module: nn.Module, inputs: Any, output: Any) -> None:
            self.in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
            self.out_size = parse_batch_shape(output)

        return self.module.register_forward_hook(note)


class ModelSummary:
    """What a module consists of. `str()` of it is the table.

    Where the module has an `example_input_array` (a tensor, a tuple of positional arguments or a dictionary of named
    ones), it is run once, in evaluation mode, for the sizes and the floating-point operations.

    Args:
        model: The module.
        max_depth: How many levels of submodules to list: 1 for the module's own, -1 for all, 0 for none.

    Raises:
        ValueError: For a depth below -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"max_depth={max_depth!r}: give a number of levels, 0 for none or -1 for all")
        self._model = model
        self._max_depth = max_depth
        self._flops: dict[str, dict[Any, int]] = {}
        self._layers = {name: LayerSummary(module) for name, module in self.named_modules}
        self._run_example()

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The submodules that the table lists."""
        named = [(name, module) for name, module in self._model.named_modules() if name]
        return [(name, module) for name, module in named if self._max_depth < 0 or name.count(".") < self._max_depth]

    def summarize(self) -> dict[str, LayerSummary]:
        """The lines of the table, by the submodules' names."""
        return self._layers

    @property
    def layer_names(self) -> list[str]:
        """The submodules' names."""
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        """Their classes' names."""
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """Shapes of what they are given."""
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """Shapes of what they return."""
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """Their parameters."""
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each is in training mode."""
        return [layer.training for layer in self._layers.values()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many submodules, of all levels, are in "train" and in "eval" mode."""
        modes = [module.training for name, module in self._model.named_modules() if name]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def total_parameters(self) -> int:
        """How many numbers all parameters are."""
        return sum(_size(parameter) for parameter in self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Those that are trained."""
        return sum(_size(parameter) for parameter in self._model.parameters() if parameter.requires_grad)

    @property
    def total_layer_params(self) -> int:
        """Those that belong to the listed submodules."""
        listed = {id(p): _size(p) for layer in self._layers.values() for p in layer.module.parameters()}
        return sum(listed.values())

    @property
    def model_size(self) -> float:
        """The parameters' size in memory, in MB (10**6 bytes)."""
        return sum(_size(parameter) * parameter.dtype.itemsize for parameter in self._model.parameters()) * 1e-6

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """Floating-point operations of one forward of the example, by submodule and operator."""
        return {name: self._flops.get(f"{type(self._model).__name__}.{name}", {}) for name in self._layers}

    @property
    def total_flops(self) -> int:
        """Floating-point operations of one forward of the example; 0 without an example."""
        return sum(self._flops.get("Global", {}).values())

    def _run_example(self) -> None:
        example = getattr(self._model, "example_input_array", None)
        if example is None:
            return
        from torch.utils.flop_counter import FlopCounterMode

        example = _moved(example, next((p.device for p in self._model.parameters()), torch.device("cpu")))
        trainer = getattr(self._model, "_trainer", None)
        precision = None if trainer is None else trainer.precision_plugin
        convert = None if precision is None else precision.input_converter()
        context = None if precision is None else precision.forward_context()
        example = example if convert is None else convert(example)
        handles = [layer.watch() for layer in self._layers.values()]
        counter = FlopCounterMode(display=False)
        try:
            forward_context = nullcontext() if context is None else context()
            with torch.no_grad(), isolate_rng(), _evaluating(self._model), forward_context, counter:
                if isinstance(example, dict):
                    self._model(**example)
                else:
                    self._model(*(example if isinstance(example, (tuple, list)) else (example,)))
        finally:
            for handle in handles:
                handle.remove()
        self._flops = {name: dict(counts) for name, counts in counter.get_flop_counts().items()}

    def columns(self) -> dict[str, list[str]]:
        """The table's columns: their titles, and a cell for each listed submodule."""
        layers = list(self._layers.values())
        table = {
            " ": [str(index) for index in range(len(layers))],
            "Name": list(self._layers),
            "Type": [layer.layer_type for layer in layers],
            "Params": [get_human_readable_count(layer.num_parameters) for layer in layers],
            "Mode": ["train" if layer.training else "eval" for layer in layers],
        }
        if self._flops:
            table["FLOPs"] = [get_human_readable_count(sum(counts.values())) for counts in self.flop_counts.values()]
            table["In sizes"] = [str(layer.in_size) for layer in layers]
            table["Out sizes"] = [str(layer.out_size) for layer in layers]
        others = self.total_parameters - self.total_layer_params
        if others:
            row = {" ": " ", "Name": LEFTOVER_PARAMS_NAME, "Params": get_human_readable_count(others)}
            for title, cells in table.items():
                cells.append(row.get(title, NOT_APPLICABLE))
        return table

    def __str__(self) -> str:
        totals = format_totals(
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )
        return format_table(self.columns(), totals)

    __repr__ = __str__


def format_totals(
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: dict[str, int],
    total_flops: int,
) -> list[tuple[str, str]]:
    """What stands below the table, each number with its name; operations only where they were counted."""
    totals = [
        (get_human_readable_count(trainable_parameters), "Trainable params"),
        (get_human_readable_count(total_parameters - trainable_parameters), "Non-trainable params"),
        (get_human_readable_count(total_parameters), "Total params"),
        (get_formatted_model_size(model_size), "Total estimated model params size (MB)"),
        (str(total_training_modes["train"]), "Modules in train mode"),
        (str(total_training_modes["eval"]), "Modules in eval mode"),
    ]
    return [*totals, (get_human_readable_count(total_flops), "Total FLOPs")] if total_flops else totals


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """What a module consists of.

    Args:
        lightning_module: The module.
        max_depth: How many levels of submodules to list: 1 for the module's own, -1 for all, 0 for none.
    """
    return ModelSummary(lightning_module, max_depth)


def format_table(columns: dict[str, list[str]], totals: list[tuple[str, str]]) -> str:
    """Columns under their titles, and the totals below them."""
    widths = [max(len(title), *map(len, cells), 0) if cells else len(title) for title, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, *(f"{number:<10}{label}" for number, label in totals)])


def get_human_readable_count(number: int) -> str:
    """A number with K, M, B (10**9) or T (10**12) behind it: 1234 is "1.2 K"."""
    if number < 0:
        raise ValueError(f"number={number}: give 0 or more")
    unit = 0
    scaled = float(number)
    while scaled >= 1000 and unit < len(_UNITS) - 1:
        scaled /= 1000
        unit += 1
    shown = f"{scaled:,.1f}" if unit and scaled < 100 else f"{int(scaled):,d}"
    return f"{shown} {_UNITS[unit]}".rstrip()


def get_formatted_model_size(total_model_size: float) -> str:
    """A size in MB, as "1,234.567"."""
    return f"{total_model_size:,.3f}"


def parse_batch_shape(value: Any) -> Any:
    """A tensor's shape as a list; nests of tensors as lists and dictionaries of shapes; "?" for anything else."""
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {key: parse_batch_shape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [parse_batch_shape(item) for item in value]
    return UNKNOWN_SIZE


def _size(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else prod(parameter.shape)


def _moved(value: Any, device: torch.device) -> Any:
    move = partial(_moved, device=device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(item) for key, item in value.items()}
    return type(value)(map(move, value)) if type(value) in (list, tuple) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
