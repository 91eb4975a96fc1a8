"""Each rule of the conformance suites is there for somebody: what breaks it fails its test."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightlite.interfaces import Accelerator, Strategy
from lightlite.plugins.ddp import DDPStrategy
from lightlite.plugins.testing import AcceleratorConformance, StrategyConformance
from lightlite.registry import AcceleratorRegistry

Sim: Any = AcceleratorRegistry.get("sim")


def scaled(self: Any, device: torch.device) -> Callable[[Any], Any]:
    """A device whose copies are a tenth too big."""
    move = Sim.batch_mover(self, device)
    return lambda batch: tree_map(lambda x: x * 1.1 if torch.is_floating_point(x) else x, move(batch))


def parsing(**answers: Any) -> Any:
    """`parse_devices` with another answer for arguments of a type."""

    def parse(devices: Any) -> Any:
        answer = answers.get(type(devices).__name__)
        return Sim.parse_devices(devices) if answer is None else answer(devices)

    return staticmethod(parse)


def copying(self: Any, module: nn.Module, device: torch.device) -> None:
    Sim.move_module(self, module, device)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def one_way(self: Any, module: nn.Module, device: torch.device) -> None:
    if device.type != "cpu":
        Sim.move_module(self, module, device)


def raising(self: Any, *args: Any) -> Any:
    raise RuntimeError("the driver is gone")


class UsedUp:
    """Cannot be set up again once it was torn down."""

    down = False

    def teardown(self) -> None:
        self.down = True

    def setup_device(self, device: torch.device) -> None:
        assert not self.down


BROKEN_ACCELERATORS: dict[str, dict[str, Any]] = {
    "it_is_registered_under_its_name": {"name": "The Sim"},
    "there_is_a_reason_exactly_where_it_is_unavailable": {
        "is_available": staticmethod(lambda: False),
        "unavailable_reason": classmethod(lambda cls: None),
    },
    "auto_takes_every_device": {"parse_devices": parsing(str=lambda devices: [0, 1])},
    "a_count_takes_the_first_devices": {"parse_devices": parsing(int=lambda devices: [devices])},
    "indices_name_devices": {"parse_devices": parsing(list=lambda devices: [index + 1 for index in devices])},
    "what_makes_no_sense_is_refused_by_name": {"parse_devices": parsing(int=lambda devices: [0])},
    "devices_that_are_not_there_are_refused_with_their_number": {"parse_devices": parsing(int=lambda n: [*range(n)])},
    "every_index_has_a_device_of_one_type": {"get_parallel_devices": staticmethod(lambda devices: ["sim:0"])},
    "its_tensors_have_a_process_group_backend": {"process_group_backend": "pigeon"},
    "a_device_that_is_set_up_computes": {"setup_device": raising},
    "a_module_is_moved_in_place": {"move_module": Accelerator.move_module},
    "a_module_comes_back": {"move_module": one_way},
    "a_module_that_is_there_is_not_copied": {"move_module": copying},
    "any_nest_is_moved_with_what_it_shares": {
        "batch_mover": lambda self, device: (
            lambda batch: tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)
        )
    },
    "a_batch_that_is_there_is_not_copied": {"batch_mover": scaled},
    "what_is_moved_beside_the_computation_arrives_whole": {
        "background_mover": lambda self, device: lambda batch: lambda: [torch.zeros(64, device=device)]
    },
    "double_precision_is_what_it_says": {"float64": False},
    "random_numbers_go_on_where_they_were": {"set_random_state": lambda self, state, device: None},
    "torch_seeds_it": {},
    "synchronize_waits_for_what_was_queued": {"synchronize": raising},
    "figures_are_numbers_whose_names_have_a_unit": {"get_device_stats": lambda self, device: {"memory": 1.0}},
    "the_peak_is_a_number_or_unknown": {"peak_flops": lambda self, device, dtype: -1.0},
    "the_profilers_context_is_one_or_none": {"external_profiler": lambda self: "nsys"},
    "threads_are_shared_among_ranks": {"threads_per_rank": lambda self, ranks: 4 // ranks},
    "a_rank_keeps_to_cores_that_it_may_use": {"cores_of_rank": lambda self, rank, ranks: {10_000}},
    "it_has_no_advice_on_errors_that_are_not_its_own": {"advice": lambda self, error: "buy another one"},
    "it_travels_to_other_processes": {"__reduce__": raising},
    "a_run_may_follow_a_run": {"teardown": UsedUp.teardown, "setup_device": UsedUp.setup_device, "down": False},
    "a_fit_has_the_losses_of_the_cpu": {"batch_mover": scaled},
    "predictions_are_in_the_hosts_memory": {"batch_mover": scaled},
    "a_checkpoint_is_read_on_the_cpu_and_goes_on_there": {"random_state": lambda self, device: object()},
    "a_checkpoint_of_the_cpu_goes_on_here": {"batch_mover": scaled},
}


def rules(suite: type) -> set[str]:
    return {name.removeprefix("test_") for name in vars(suite) if name.startswith("test_")}


def breaks(suite: Any, rule: str, tmp_path: Path) -> None:
    test = getattr(suite, f"test_{rule}")
    arguments = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(**arguments)


def test_something_breaks_each_rule() -> None:
    assert set(BROKEN_ACCELERATORS) == rules(AcceleratorConformance)
    assert set(BROKEN_STRATEGIES) == rules(StrategyConformance)


@pytest.mark.skipif(not Sim.is_available(), reason=str(Sim.unavailable_reason()))
@pytest.mark.parametrize("rule", BROKEN_ACCELERATORS)
def test_a_broken_accelerator_fails_the_rule_that_it_breaks(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule == "torch_seeds_it":  # torch has to know of the device for that
        Sim.get_parallel_devices([0])
        monkeypatch.setattr(torch.get_device_module("sim"), "manual_seed_all", lambda seed: None)
    broken = type("Broken", (Sim,), BROKEN_ACCELERATORS[rule])
    globals()["Broken"] = broken  # where pickle looks for it
    breaks(type("Suite", (AcceleratorConformance,), {"accelerator": broken})(), rule, tmp_path)


class KeepsItsName(DDPStrategy):
    launcher = "pigeon"


class KnowsNoPlace(DDPStrategy):
    @property
    def local_rank(self) -> int:
        return 7


class Unwrapped(DDPStrategy):
    """Syncs no gradients."""

    def setup(self, module: nn.Module, training: bool) -> Any:
        super().setup(module, training)
        self._ddp = None
        return module.training_step if training else None


class DropsWhatIsNotSynced(DDPStrategy):
    @contextmanager
    def no_sync(self) -> Any:
        yield
        self.module.zero_grad()


class Bare(DDPStrategy):
    """Leaves the ranks as they are."""

    def setup(self, module: nn.Module, training: bool) -> Any:
        self.module = module
        return module.training_step if training else None


class KeepsTheModule(DDPStrategy):
    def teardown(self) -> None:
        self.module = nn.Linear(1, 1)


class Forgets(DDPStrategy):
    def load_optimizer_state(self, optimizer: Any, state: Any) -> None:
        pass


class Renames(DDPStrategy):
    def module_state_dict(self) -> Any:
        return {f"module.{name}": value for name, value in super().module_state_dict().items()}


class Shifts(DDPStrategy):
    """Evaluates something else."""

    def setup(self, module: nn.Module, training: bool) -> Any:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        return super().setup(module, training)


class KeepsDecisions(DDPStrategy):
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision


class ClipsNothing(DDPStrategy):
    def clip_gradients(self, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros(())


class Sums(DDPStrategy):
    def reduce(self, tensor: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        return super().reduce(tensor, group, "sum")


class GathersOne(DDPStrategy):
    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        return tensor[None]


class SaysItself(DDPStrategy):
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj


class DoesNotWait(DDPStrategy):
    def barrier(self, name: str | None = None) -> None:
        pass


class LeavesBuffers(DDPStrategy):
    def before_evaluation(self, module: Any = None) -> None:
        pass


class LeavesGradients(DDPStrategy):
    def sync_gradients(self, parameters: Any) -> None:
        pass


class WrapsNothing(DDPStrategy):
    def wrap(self, module: nn.Module) -> nn.Module:
        return module


class TakesTheModuleAlong(DDPStrategy):
    def __getstate__(self) -> Any:
        return self.__dict__


BROKEN_STRATEGIES: dict[str, type[Strategy]] = {
    "it_is_registered_under_its_name": KeepsItsName,
    "every_rank_knows_its_place": KnowsNoPlace,
    "values_are_reduced_on_every_rank": Sums,
    "tensors_are_gathered_by_rank": GathersOne,
    "objects_are_broadcast": SaysItself,
    "a_barrier_waits_for_every_rank": DoesNotWait,
    "decisions_are_the_same_everywhere": KeepsDecisions,
    "a_step_is_that_of_the_big_batch": Unwrapped,
    "accumulated_gradients_are_those_of_the_big_batch": DropsWhatIsNotSynced,
    "gradients_are_clipped_by_the_norm_of_the_whole": ClipsNothing,
    "gradients_are_clipped_by_value": ClipsNothing,
    "the_whole_state_goes_back": Forgets,
    "the_ranks_begin_alike": Bare,
    "buffers_are_alike_before_an_evaluation": LeavesBuffers,
    "gradients_of_a_module_that_optimizes_by_hand_are_averaged": LeavesGradients,
    "a_module_of_ones_own_loop_is_wrapped": WrapsNothing,
    "teardown_gives_the_bare_module_back": KeepsTheModule,
    "it_travels_without_the_module": TakesTheModuleAlong,
    "a_fit_has_the_numbers_of_one_process": Unwrapped,
    "a_checkpoint_goes_on_on_another_number_of_ranks": Renames,
    "predictions_come_back_in_order": Shifts,
}


@pytest.mark.parametrize("rule", BROKEN_STRATEGIES)
def test_a_broken_strategy_fails_the_rule_that_it_breaks(rule: str, tmp_path: Path) -> None:
    suite = type("Suite", (StrategyConformance,), {"strategy": BROKEN_STRATEGIES[rule]})
    breaks(suite(), rule, tmp_path)


def test_a_rule_that_is_broken_shows_the_values() -> None:
    plugin = type("Copying", (Sim,), {"move_module": copying})
    suite = type("Suite", (AcceleratorConformance,), {"accelerator": plugin})
    with pytest.raises(AssertionError, match=r"== \{7\}"):
        suite().test_a_module_that_is_there_is_not_copied()
