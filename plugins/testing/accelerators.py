"""What an accelerator has to keep to."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections import namedtuple
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator
from lightlite.plugins.testing import programs
from lightlite.registry import AcceleratorRegistry

CPU = torch.device("cpu")
Point = namedtuple("Point", "x y")


class AcceleratorConformance:
    """Rules for one accelerator. Subclass it, name the accelerator, and let pytest collect the subclass.

    Attributes:
        accelerator: Registered name, or the class itself, which has to be made without arguments.
        limited: Whether there is a fixed number of devices, so that more cannot be asked for.
        tolerance: By how much a loss may differ from the CPU's, absolutely.
        units: How names of figures may end: the unit, or what is counted.
    """

    accelerator: str | type[Accelerator] = ""
    limited: bool = True
    tolerance: float = 1e-5
    units: tuple[str, ...] = (
        "bytes", "percent", "celsius", "watts", "joules", "hertz", "megahertz", "seconds", "count", "retries", "errors",
        "threads",
    )  # fmt: skip

    @pytest.fixture(autouse=True)
    def _here(self) -> None:
        reason = self.plugin().unavailable_reason()
        if reason is not None:
            pytest.skip(f"{self.plugin().name}: {reason}")

    def plugin(self) -> type[Accelerator]:
        """The accelerator's class."""
        given = self.accelerator
        return AcceleratorRegistry.get(given) if isinstance(given, str) else given

    def device(self) -> torch.device:
        """Its first device."""
        return self.plugin().get_parallel_devices(self.plugin().parse_devices(1))[0]

    def ready(self) -> tuple[Accelerator, torch.device]:
        """The accelerator and its first device, set up."""
        accelerator, device = self.plugin()(), self.device()
        accelerator.setup_device(device)
        return accelerator, device

    def test_it_is_registered_under_its_name(self) -> None:
        name = self.plugin().name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), f"name={name!r} is no word of lower-case letters"
        if isinstance(self.accelerator, str):
            assert name == self.accelerator

    def test_there_is_a_reason_exactly_where_it_is_unavailable(self) -> None:
        available, reason = self.plugin().is_available(), self.plugin().unavailable_reason()
        assert available is (reason is None), f"is_available() is {available}, but unavailable_reason() is {reason!r}"

    def test_auto_takes_every_device(self) -> None:
        parse, count = self.plugin().parse_devices, self.plugin().auto_device_count()
        assert parse("auto") == parse(-1) == parse("-1") == parse("auto")
        assert len(set(parse("auto"))) == len(parse("auto")) == count >= 1

    def test_a_count_takes_the_first_devices(self) -> None:
        parse, every = self.plugin().parse_devices, self.plugin().parse_devices("auto")
        for count in range(1, len(every) + 1):
            assert parse(count) == parse(str(count)) == every[:count]

    def test_indices_name_devices(self) -> None:
        parse, every = self.plugin().parse_devices, self.plugin().parse_devices("auto")
        for index in every:
            assert parse([index]) == parse((index,)) == parse(f"{index},") == [index]
        assert parse(every) == parse(",".join(map(str, every)) + ",") == every

    def test_what_makes_no_sense_is_refused_by_name(self) -> None:
        for devices in (0, "0", -2, [], "", "two", [-1], [0, 0], ["0"], True, 1.5, None):
            with pytest.raises(MisconfigurationException) as caught:
                self.plugin().parse_devices(devices)  # type: ignore[arg-type]
            assert repr(devices) in str(caught.value), f"the error for {devices!r} does not show what was given"

    def test_devices_that_are_not_there_are_refused_with_their_number(self) -> None:
        if not self.limited:
            pytest.skip(f"{self.plugin().name} has as many devices as are asked for")
        count = self.plugin().auto_device_count()
        for devices in (count + 1, str(count + 1), [count], [0, count], f"{count},"):
            with pytest.raises(MisconfigurationException) as caught:
                self.plugin().parse_devices(devices)
            assert repr(devices) in str(caught.value), f"the error for {devices!r} does not show what was given"
            # However many there are is said, in digits or in words.
            assert str(count) in str(caught.value) or count == 1, "the error does not say how many devices there are"

    def test_every_index_has_a_device_of_one_type(self) -> None:
        indices = self.plugin().parse_devices("auto")
        devices = self.plugin().get_parallel_devices(indices)
        assert len(devices) == len(indices)
        assert all(isinstance(device, torch.device) for device in devices)
        assert len({device.type for device in devices}) == 1

    def test_its_tensors_have_a_process_group_backend(self) -> None:
        for part in self.plugin().process_group_backend.split(","):
            backend = part.rpartition(":")[2]
            assert backend in torch.distributed.Backend.backend_list, f"torch.distributed knows no backend {backend!r}"

    def test_a_device_that_is_set_up_computes(self) -> None:
        accelerator, device = self.ready()
        accelerator.setup_device(device)
        assert torch.ones(2, device=device).sum().item() == 2

    def test_a_module_is_moved_in_place(self) -> None:
        accelerator, device = self.ready()
        module = programs.Parts()
        before, values = list(module.parameters()), _values(module)
        trained = [p.requires_grad for p in before]
        assert accelerator.move_module(module, device) is None  # type: ignore[func-returns-value]
        assert _devices(module) == {device}, "a parameter, a buffer or a gradient is elsewhere"
        after = list(module.parameters())
        assert [id(p) for p in before] == [id(p) for p in after], "the parameters are other objects than before"
        assert [p.requires_grad for p in after] == trained
        assert module.tied is module.layer.weight
        assert _values(module) == values

    def test_a_module_comes_back(self) -> None:
        accelerator, device = self.ready()
        module = programs.Parts()
        before, values = list(module.parameters()), _values(module)
        accelerator.move_module(module, device)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.mul_(2)
        accelerator.move_module(module, CPU)
        assert _devices(module) == {CPU}
        assert [id(p) for p in before] == [id(p) for p in module.parameters()]
        assert _values(module) == [[2 * value for value in tensor] for tensor in values]

    def test_a_module_that_is_there_is_not_copied(self) -> None:
        accelerator, device = self.ready()
        module = programs.Parts()
        accelerator.move_module(module, device)
        views = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
        accelerator.move_module(module, device)
        for view in views:
            view.fill_(7)
        assert {value for values in _values(module) for value in values} == {7}

    def test_any_nest_is_moved_with_what_it_shares(self) -> None:
        accelerator, device = self.ready()
        move, shared = accelerator.batch_mover(device), torch.ones(2)
        if move is None:
            assert device == CPU, "batch_mover may be None only where batches are on the device as they are loaded"
            return
        nest: dict[str, Any] = {
            "point": Point(shared, [shared, "text", 3, None]),
            "record": _Record(shared),
            "own": _Own(shared),
        }
        moved = move(nest)
        assert type(moved) is dict
        assert moved["point"].x.device == moved["record"].values.device == moved["own"].value.device == device
        assert moved["point"].x is moved["point"].y[0] is moved["record"].values, "what was shared is not any more"
        assert moved["point"].y[1:] == ["text", 3, None]
        assert nest["point"].x is shared
        assert shared.device == CPU
        accelerator.synchronize(device)
        assert moved["own"].value.tolist() == [1, 1]

    def test_a_batch_that_is_there_is_not_copied(self) -> None:
        accelerator, device = self.ready()
        move, batch = accelerator.batch_mover(device), [torch.ones(2, device=device)]
        assert move is None or move(batch)[0] is batch[0]

    def test_what_is_moved_beside_the_computation_arrives_whole(self) -> None:
        accelerator, device = self.ready()
        begin = accelerator.background_mover(device)
        if begin is None:
            return
        batches = [[torch.full((64,), float(number))] for number in range(4)]
        begun = [begin(batch) for batch in batches]
        begun.pop(0)  # one is dropped
        for number, ready in enumerate(begun, 1):
            (moved,) = ready()
            assert moved.device == device
            assert (2 * moved).tolist() == [2.0 * number] * 64

    def test_double_precision_is_what_it_says(self) -> None:
        accelerator, device = self.ready()
        module, batch = nn.Linear(1, 1).double(), torch.ones(1, dtype=torch.float64)
        accelerator.move_module(module, device)
        move = accelerator.batch_mover(device)
        moved = batch if move is None else move(batch)
        expected = torch.float64 if self.plugin().float64 else torch.float32
        assert module.weight.dtype == moved.dtype == module(moved).dtype == expected, f"float64={self.plugin().float64}"

    def test_random_numbers_go_on_where_they_were(self, tmp_path: Path) -> None:
        accelerator, device = self.ready()
        state = accelerator.random_state(device)
        if state is None:
            host = torch.get_rng_state()
            first = _draw(device)
            torch.set_rng_state(host)
            assert _draw(device) == first, "random_state() is None, but the numbers are not of the host's generator"
            return
        first = _draw(device)
        torch.save(state, tmp_path / "state")
        accelerator.set_random_state(torch.load(tmp_path / "state", map_location="cpu", weights_only=True), device)
        assert _draw(device) == first

    def test_torch_seeds_it(self) -> None:
        _, device = self.ready()
        torch.manual_seed(3)
        first = _draw(device)
        assert _draw(device) != first
        torch.manual_seed(3)
        assert _draw(device) == first

    def test_synchronize_waits_for_what_was_queued(self) -> None:
        accelerator, device = self.ready()
        result = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        assert accelerator.synchronize(device) is None  # type: ignore[func-returns-value]
        assert result[0, 0].item() == 64

    def test_figures_are_numbers_whose_names_have_a_unit(self) -> None:
        accelerator, device = self.ready()
        for name, value in accelerator.get_device_stats(device).items():
            assert isinstance(value, float), f"{name} is {value!r}"
            assert math.isfinite(value), f"{name} is {value!r}"
            assert re.fullmatch(rf"[a-z][a-z0-9_]*_({'|'.join(self.units)})", name), f"{name!r} ends in no known unit"

    def test_the_peak_is_a_number_or_unknown(self) -> None:
        accelerator, device = self.ready()
        for dtype in (torch.float32, torch.bfloat16):
            peak = accelerator.peak_flops(device, dtype)
            assert peak is None or (isinstance(peak, (int, float)) and peak > 0)

    def test_the_profilers_context_is_one_or_none(self) -> None:
        accelerator, _ = self.ready()
        context = accelerator.external_profiler()
        assert context is None or isinstance(context, AbstractContextManager)

    def test_threads_are_shared_among_ranks(self) -> None:
        accelerator = self.plugin()()
        shares = [accelerator.threads_per_rank(ranks) for ranks in (1, 2, 1000)]
        assert all(share is None or (type(share) is int and share >= 1) for share in shares), shares

    def test_a_rank_keeps_to_cores_that_it_may_use(self) -> None:
        if not hasattr(os, "sched_getaffinity"):
            pytest.skip("this system does not bind processes to cores")
        accelerator, allowed = self.plugin()(), os.sched_getaffinity(0)
        for rank in range(2):
            cores = accelerator.cores_of_rank(rank, 2)
            assert cores is None or (cores and cores <= allowed), cores

    def test_it_has_no_advice_on_errors_that_are_not_its_own(self) -> None:
        assert self.plugin()().advice(KeyError("x")) == ""

    def test_it_travels_to_other_processes(self) -> None:
        accelerator, device = self.ready()
        for received in (pickle.loads(pickle.dumps(self.plugin()())), pickle.loads(pickle.dumps(accelerator))):
            assert type(received) is self.plugin()
            received.setup_device(device)

    def test_a_run_may_follow_a_run(self) -> None:
        accelerator, device = self.ready()
        accelerator.teardown()
        accelerator.teardown()
        accelerator.setup_device(device)
        assert torch.ones(2, device=device).sum().item() == 2

    def test_a_fit_has_the_losses_of_the_cpu(self) -> None:
        on_cpu, here = programs.fit("cpu"), programs.fit(self.plugin()())
        assert here.losses == pytest.approx(on_cpu.losses, abs=self.tolerance)
        assert here.metrics == pytest.approx(on_cpu.metrics, abs=self.tolerance)
        assert _devices(here.module) == {CPU}, "after the fit, something of the module is not in the host's memory"

    def test_predictions_are_in_the_hosts_memory(self) -> None:
        on_cpu, here = programs.predict("cpu"), programs.predict(self.plugin()())
        assert here.device == CPU
        assert here.flatten().tolist() == pytest.approx(on_cpu.flatten().tolist(), abs=self.tolerance)

    def test_a_checkpoint_is_read_on_the_cpu_and_goes_on_there(self, tmp_path: Path) -> None:
        whole = programs.fit("cpu")
        programs.fit(self.plugin()(), save_to=tmp_path / "half.ckpt")
        read = torch.load(tmp_path / "half.ckpt", map_location="cpu", weights_only=True)
        assert {tensor.device for tensor in _tensors(read)} == {CPU}
        resumed = programs.fit("cpu", resume_from=tmp_path / "half.ckpt")
        assert resumed.losses == pytest.approx(whole.losses[len(whole.losses) // 2 :], abs=self.tolerance)

    def test_a_checkpoint_of_the_cpu_goes_on_here(self, tmp_path: Path) -> None:
        whole = programs.fit("cpu", save_to=tmp_path / "half.ckpt")
        resumed = programs.fit(self.plugin()(), resume_from=tmp_path / "half.ckpt")
        assert resumed.losses == pytest.approx(whole.losses[len(whole.losses) // 2 :], abs=self.tolerance)


@dataclass(frozen=True)
class _Record:
    values: Tensor


class _Own:
    """A batch of another library."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def to(self, device: torch.device) -> _Own:
        return _Own(self.value.to(device))


def _draw(device: torch.device) -> list[float]:
    drawn: list[float] = torch.rand(4, device=device).tolist()
    return drawn


def _values(module: nn.Module) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in (*module.parameters(), *module.buffers())]


def _devices(module: nn.Module) -> set[torch.device]:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return {tensor.device for tensor in (*module.parameters(), *module.buffers(), *gradients)}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
