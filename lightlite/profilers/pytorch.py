"""What each operation of PyTorch cost, on the host and on the device."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler import emit_nvtx as nvtx_ranges
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerAction, tensorboard_trace_handler

from lightlite.errors import MisconfigurationException
from lightlite.profilers.profiler import Profiler
from lightlite.utilities import files

if TYPE_CHECKING:
    from torch import nn

STEPS = {
    "run_training_batch": "training_step",
    "validation_step": "validation_step",
    "test_step": "test_step",
    "predict_step": "predict_step",
}
"""The ends of actions that are one batch, and under what name they are reported."""
OWN_OPTIONS = ("export_to_flame_graph", "metric")
BUSY = (ProfilerAction.WARMUP, ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
LEAST_STEPS = 5


class PyTorchProfiler(Profiler):
    """Records the operations of a few batches by `torch.profiler`: a table of them, and a trace for Chrome or Perfetto.

    Each kind of step (training, validation, …) has a schedule of its own, which counts its batches; the sanity check
    does not count. By default one batch passes, one warms up and three are recorded; of fewer than five batches, the
    first three. While one kind is recorded another one waits, but its batches show in the trace.

    Args:
        dirpath: See `Profiler`; traces are written there too.
        filename: See `Profiler`.
        group_by_input_shapes: Whether the table has a row for each shape of inputs; needs `record_shapes=True`.
        emit_nvtx: Mark the operations for an external profiler of the device (`nsys profile -c cudaProfilerApi …`)
            instead of recording them.
        export_to_chrome: Whether to write a trace of each recording, `<stage>-<filename>-<step>.<time>.pt.trace.json`.
        row_limit: Rows of the table; -1 for all.
        sort_by_key: What the table is sorted by, one of `AVAILABLE_SORT_KEYS`; by default the total time on the device,
            where there is one, else on the CPU. Lightning's names, "cuda_…" for "device_…", are understood.
        record_module_names: Whether to mark in the trace which submodule an operation belongs to.
        table_kwargs: More arguments of `torch.autograd.profiler_util.EventList.table`.
        profiler_kwargs: Arguments of `torch.profiler.profile`, such as `schedule`, `on_trace_ready`, `activities`,
            `record_shapes`, `profile_memory` and `with_stack`; `schedule=None` records everything. Besides,
            `export_to_flame_graph=True` writes stacks for a flame graph, by `metric` ("self_cpu_time_total").

    Attributes:
        profiler: The `torch.profiler.profile` used last.
        function_events: The operations that it recorded last.

    Raises:
        MisconfigurationException: For an unknown sort key or argument, or a schedule that is none.
        KeyError: For an unknown key of `table_kwargs`.
    """

    AVAILABLE_SORT_KEYS = frozenset(
        f"{own}{where}_{what}"
        for own in ("", "self_")
        for where in ("cpu", "device")
        for what in ("time_total", "memory_usage")
    ) | {"count", "cpu_time", "device_time"}

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        _check_options(profiler_kwargs)
        self._options = {key: value for key, value in profiler_kwargs.items() if key not in OWN_OPTIONS}
        self._flame_metric = profiler_kwargs.get("metric", "self_cpu_time_total")
        self._flame_graph = bool(profiler_kwargs.get("export_to_flame_graph", False))
        self._group_by_shapes = group_by_input_shapes and bool(profiler_kwargs.get("record_shapes"))
        self._emit_nvtx = emit_nvtx
        self._export_to_chrome = export_to_chrome
        self._record_module_names = record_module_names
        self._table = {**_checked_table_options(table_kwargs or {}), "row_limit": row_limit}
        self._sort_by = None if sort_by_key is None else self._sort_key(sort_by_key)
        self.profiler: Any = None
        self.function_events: EventList | None = None
        self._begin()

    def _begin(self) -> None:
        self._windows: dict[str, Any] = {}
        self._tables: dict[str, str] = {}
        self._marks: dict[str, record_function] = {}
        self._attached: ExitStack | None = None

    @classmethod
    def _sort_key(cls, given: str) -> str:
        key = re.sub(r"^(self_)?(?!self|cpu|device|count)[a-z0-9]+_(time|memory)", r"\1device_\2", given)
        if key not in cls.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"PyTorchProfiler(sort_by_key={given!r}): give one of {', '.join(sorted(cls.AVAILABLE_SORT_KEYS))}"
            )
        return key

    def start(self, action_name: str) -> None:
        """An action begins; where it is a step, recording goes on as its schedule says."""
        if self._attached is None:
            self._attached = self._attach()
        step = _step_of(action_name)
        if step is not None and not self._emit_nvtx:
            self._open(step)
        if action_name not in self._marks and (self._emit_nvtx or self._busy() is not None):
            self._marks[action_name] = record_function(f"[pl][profile]{action_name}")
            self._marks[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        """An action ends."""
        mark = self._marks.pop(action_name, None)
        if mark is not None:
            mark.__exit__(None, None, None)
        step = _step_of(action_name)
        window = None if step is None else self._windows.get(step)
        if step is None or window is None or self._busy() not in (None, step) or self._checking_sanity():
            return
        try:
            window.step()
        except BaseException:
            # What a user's on_trace_ready raised; PyTorch would crash if its recording was stopped a second time.
            del self._windows[step]
            raise

    def _open(self, step: str) -> None:
        """Begin this kind of step's schedule, unless another one's is recording."""
        if step in self._windows or self._busy() is not None or self._checking_sanity():
            return
        options = dict(self._options)
        if "schedule" not in options:
            options["schedule"] = partial(_first_steps, self._number_of(step))
        ready = options.pop("on_trace_ready", None)
        options["on_trace_ready"] = partial(self._keep, step, ready)
        options["with_stack"] = options.get("with_stack", False) or self._flame_graph
        self.profiler = self._windows[step] = torch.profiler.profile(**options)
        self.profiler.start()

    def _busy(self) -> str | None:
        """The kind of step that is recorded, or about to be; PyTorch can do so for one at a time."""
        return next((step for step, window in self._windows.items() if window.current_action in BUSY), None)

    def _checking_sanity(self) -> bool:
        module = self._lightning_module
        return module is not None and module.trainer.sanity_checking

    def _number_of(self, step: str) -> float:
        """How many batches of this kind there are in a pass, on this rank; infinite where unknown."""
        if self._lightning_module is None:
            return math.inf
        trainer = self._lightning_module.trainer
        if step == "training_step":
            return float(trainer.num_training_batches)
        name = {"validation_step": "val", "test_step": "test", "predict_step": "predict"}[step]
        return float(sum(getattr(trainer, f"num_{name}_batches")) // trainer.world_size)

    def _keep(self, step: str, ready: Callable[[Any], Any] | None, window: Any) -> None:
        """A recording is whole: make its table, and hand it on."""
        self.function_events = window.events()
        averages = window.key_averages(group_by_input_shape=self._group_by_shapes)
        on_device = any(average.device_time_total for average in averages)
        sort_by = self._sort_by or ("device_time_total" if on_device else "cpu_time_total")
        self._tables[step] = averages.table(sort_by=sort_by, **self._table)
        if ready is not None:
            ready(window)
            return
        if self.dirpath is None:
            return
        folder = os.fspath(self.dirpath)
        if self._export_to_chrome:
            tensorboard_trace_handler(folder, self._file_name("", step))(window)
        if self._flame_graph:
            files.make_folder(folder)
            window.export_stacks(os.path.join(folder, self._file_name(".stack", step)), self._flame_metric)

    def _attach(self) -> ExitStack:
        """Mark operations for an external profiler, and submodules, where asked for."""
        stack = ExitStack()
        module = self._lightning_module
        if self._emit_nvtx:
            if module is not None:
                stack.enter_context(_external_profiler(module.trainer.accelerator))
            stack.enter_context(nvtx_ranges())
        if module is not None and self._record_module_names:
            stack.enter_context(RegisterRecordFunction(module))
        return stack

    def summary(self) -> str:
        """A table of operations for each kind of step."""
        self._end_recording()
        return self._titled(self._tables) if self._tables else ""

    def _end_recording(self) -> None:
        windows, self._windows = self._windows, {}
        for window in windows.values():
            window.stop()

    def teardown(self, stage: str | None) -> None:
        """See `Profiler.teardown`."""
        self._end_recording()
        for mark in self._marks.values():
            mark.__exit__(None, None, None)
        if self._attached is not None:
            self._attached.close()
        self._begin()
        super().teardown(stage)

    def __getstate__(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"_windows": {}, "_tables": {}, "_marks": {}, "_attached": None}
        return {**super().__getstate__(), **empty, "profiler": None, "function_events": None}


class RegisterRecordFunction:
    """Context in which a profiler of PyTorch sees which submodule's forward an operation is part of.

    Args:
        model: The module; its submodules are marked "[pl][module]<class>: <name>".
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self._open: defaultdict[str, list[record_function]] = defaultdict(list)

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            if name:
                label = f"[pl][module]{type(module).__module__}.{type(module).__name__}: {name}"
                self._handles += [
                    module.register_forward_pre_hook(partial(self._begin, label)),
                    module.register_forward_hook(partial(self._end, label), always_call=True),
                ]

    def _begin(self, label: str, *_: Any) -> None:
        mark = record_function(label)
        mark.__enter__()
        self._open[label].append(mark)

    def _end(self, label: str, *_: Any) -> None:
        if self._open[label]:
            self._open[label].pop().__exit__(None, None, None)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _step_of(action_name: str) -> str | None:
    return next((step for end, step in STEPS.items() if action_name.endswith(end)), None)


def _first_steps(steps: float, step: int) -> ProfilerAction:
    """The default schedule: pass one, warm up one, record three; of less than five, record the first three at once."""
    waiting, last = (2, 4) if steps >= LEAST_STEPS else (0, min(steps, 3) - 1)
    if step > last:
        return ProfilerAction.NONE
    if step < waiting:
        return ProfilerAction.WARMUP if step == 1 else ProfilerAction.NONE
    return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.RECORD


def _external_profiler(accelerator: Any) -> AbstractContextManager[Any]:
    external: AbstractContextManager[Any] | None = accelerator.external_profiler()
    if external is None:
        raise MisconfigurationException(
            f"PyTorchProfiler(emit_nvtx=True) marks operations for NVIDIA's profilers, and this run is on "
            f"{accelerator.name!r}; leave emit_nvtx out"
        )
    return external


def _check_options(options: dict[str, Any]) -> None:
    allowed = [name for name in inspect.signature(torch.profiler.profile.__init__).parameters if name != "self"]
    unknown = [name for name in options if name not in (*allowed, *OWN_OPTIONS)]
    if unknown:
        raise MisconfigurationException(
            f"PyTorchProfiler got {', '.join(f'{name}={options[name]!r}' for name in unknown)}; beside its own "
            f"arguments it takes those of torch.profiler.profile: {', '.join([*allowed, *OWN_OPTIONS])}"
        )
    schedule = options.get("schedule")
    if schedule is None:
        return
    action = schedule(0) if callable(schedule) else None
    if not isinstance(action, ProfilerAction):
        returned = f", which returns {action!r}" if callable(schedule) else ""
        raise MisconfigurationException(
            f"PyTorchProfiler(schedule={schedule!r}){returned}: give a function of the step's number that returns a "
            "torch.profiler.ProfilerAction, such as torch.profiler.schedule(wait=1, warmup=1, active=3)"
        )


def _checked_table_options(options: dict[str, Any]) -> dict[str, Any]:
    taken = ("self", "sort_by", "row_limit")
    allowed = [name for name in inspect.signature(EventList.table).parameters if name not in taken]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise KeyError(f"PyTorchProfiler(table_kwargs={options!r}): {unknown[0]!r} is none of {', '.join(allowed)}")
    return options
