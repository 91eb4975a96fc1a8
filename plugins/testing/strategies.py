"""What a strategy has to keep to."""

from __future__ import annotations

import contextlib
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.interfaces import Launcher, Strategy
from lightlite.plugins.testing import programs
from lightlite.registry import AcceleratorRegistry, LauncherRegistry, StrategyRegistry

CPU = torch.device("cpu")
LEARNING_RATE = 0.1
_pools: dict[tuple[str, int], Launcher] = {}


class StrategyConformance:
    """Rules for one strategy. Subclass it, name the strategy, and let pytest collect the subclass.

    Each rule is tried with every number of ranks in `world_sizes`, each a process of this machine.

    Attributes:
        strategy: Registered name, or a function without arguments that makes one.
        accelerator: Registered name of the kind of device to try it on.
        world_sizes: Numbers of ranks; those for which there are too few devices are left out.
        tolerance: By how much a number may differ from a single process's, absolutely.
    """

    strategy: str | Callable[[], Strategy] = ""
    accelerator: str = "cpu"
    world_sizes: tuple[int, ...] = (1, 2)
    tolerance: float = 1e-5

    @pytest.fixture(autouse=True)
    def _here(self) -> None:
        reason = AcceleratorRegistry.unavailable_reason(self.accelerator)
        if reason is not None:
            pytest.skip(f"{self.accelerator}: {reason}")

    def make(self) -> Strategy:
        """A new strategy."""
        return StrategyRegistry.create(self.strategy) if isinstance(self.strategy, str) else self.strategy()

    def sizes(self) -> list[int]:
        """The numbers of ranks that there are devices for."""
        plugin = AcceleratorRegistry.get(self.accelerator)
        return [size for size in self.world_sizes if _fits(plugin.parse_devices, size)]

    def on_ranks(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(strategy, *args)` returns on each rank of a run, by rank."""
        strategy = self.make()
        accelerator = AcceleratorRegistry.create(self.accelerator)
        devices = type(accelerator).get_parallel_devices(type(accelerator).parse_devices(size))
        if size == 1:
            return _on_rank(Ranks(), strategy, accelerator, devices, function, args)
        kind = strategy.launcher
        assert kind is not None, f"launcher=None says that there is one process only, but world_sizes has {size}"
        pool = _pools.setdefault((kind, size), LauncherRegistry.create(kind, local_world_size=size))
        return pool.run(_on_rank, strategy, accelerator, devices, function, args)

    def agree(self, function: Callable[..., Any], *args: Any) -> None:
        """Check that `function` gives on every rank what a plain loop in a single process gives, up to rounding."""
        expected = function(None, *args)
        for size in self.sizes():
            for rank, found in enumerate(self.on_ranks(size, function, *args)):
                where = f"on rank {rank} of {size}"
                assert found.keys() == expected.keys(), where
                for name, value in expected.items():
                    assert found[name] == pytest.approx(value, abs=self.tolerance), f"{name}, {where}"

    def test_it_is_registered_under_its_name(self) -> None:
        strategy = self.make()
        assert isinstance(strategy, Strategy)
        assert strategy.launcher is None or strategy.launcher in LauncherRegistry
        if isinstance(self.strategy, str):
            assert StrategyRegistry.get(self.strategy).name in StrategyRegistry

    def test_every_rank_knows_its_place(self) -> None:
        for size in self.sizes():
            expected = [(rank, rank, 0, size, rank == 0, self.accelerator) for rank in range(size)]
            assert self.on_ranks(size, _place) == expected

    def test_values_are_reduced_on_every_rank(self) -> None:
        for size in self.sizes():
            ranks = range(1, size + 1)
            product = 1.0
            for rank in ranks:
                product *= rank
            expected = {"sum": sum(ranks), "mean": sum(ranks) / size, "min": 1, "max": size, "product": product}
            assert self.on_ranks(size, _reduce) == [(expected, rank) for rank in ranks], "reduce, or its argument after"

    def test_tensors_are_gathered_by_rank(self) -> None:
        for size in self.sizes():
            rows = [[float(rank), 1.0] for rank in range(size)]
            gradient = [[2.0 * size * rank, 2.0 * size] for rank in range(size)]
            assert self.on_ranks(size, _gather) == [(rows, rows, gradient[rank]) for rank in range(size)]

    def test_objects_are_broadcast(self) -> None:
        for size in self.sizes():
            assert self.on_ranks(size, _broadcast) == [[{"rank": source} for source in range(size)]] * size

    def test_a_barrier_waits_for_every_rank(self, tmp_path: Path) -> None:
        for size in self.sizes():
            path = tmp_path / str(size)
            assert self.on_ranks(size, _barrier, path) == [True] * size

    def test_decisions_are_the_same_everywhere(self) -> None:
        for size in self.sizes():
            # All, any, all of True, any of False; rank 0 alone decides True in the first two.
            assert self.on_ranks(size, _decide) == [(size == 1, True, True, False)] * size

    def test_a_step_is_that_of_the_big_batch(self) -> None:
        self.agree(_steps)

    def test_accumulated_gradients_are_those_of_the_big_batch(self) -> None:
        self.agree(_accumulated)

    def test_gradients_are_clipped_by_the_norm_of_the_whole(self) -> None:
        self.agree(_clipped, "norm", 0.05)

    def test_gradients_are_clipped_by_value(self) -> None:
        self.agree(_clipped, "value", 0.01)

    def test_the_whole_state_goes_back(self) -> None:
        self.agree(_states_put_back)

    def test_the_ranks_begin_alike(self) -> None:
        for size in self.sizes():
            losses = self.on_ranks(size, _different_at_first)
            assert losses == pytest.approx([losses[0]] * size, abs=self.tolerance)

    def test_buffers_are_alike_before_an_evaluation(self) -> None:
        for size in self.sizes():
            assert self.on_ranks(size, _different_buffers) == [[0.0]] * size

    def test_gradients_of_a_module_that_optimizes_by_hand_are_averaged(self) -> None:
        self.agree(_by_hand)

    def test_a_module_of_ones_own_loop_is_wrapped(self) -> None:
        self.agree(_own_loop)

    def test_teardown_gives_the_bare_module_back(self) -> None:
        for size in self.sizes():
            for same, devices, kind, wrapped, output in self.on_ranks(size, _torn_down):
                assert same, "the module is another object than that which was handed in"
                assert devices == {"cpu"}, "something of the module is not in the host's memory"
                assert kind == "_Linear", f"the module's class is {kind}"
                assert not wrapped, "parameters are of a class of the strategy's own"
                assert output == [1]

    def test_it_travels_without_the_module(self) -> None:
        strategy = pickle.loads(pickle.dumps(self.make())) if isinstance(self.strategy, str) else self.make()
        strategy.module = _Linear()
        assert "module" not in strategy.__getstate__()

    def test_a_fit_has_the_numbers_of_one_process(self) -> None:
        on_one = programs.fit("cpu", norm=False)
        for size in self.sizes():
            here = programs.fit(self.accelerator, strategy=self.make(), devices=size, norm=False)
            assert here.metrics == pytest.approx(on_one.metrics, abs=self.tolerance)
            for mine, theirs in zip(*(_weights(None, run.module).values() for run in (here, on_one)), strict=True):
                assert mine == pytest.approx(theirs, abs=self.tolerance)

    def test_a_checkpoint_goes_on_on_another_number_of_ranks(self, tmp_path: Path) -> None:
        whole = programs.fit("cpu", norm=False)
        for size in self.sizes():
            path = tmp_path / f"{size}.ckpt"
            programs.fit(self.accelerator, strategy=self.make(), devices=size, norm=False, save_to=path)
            resumed = programs.fit("cpu", norm=False, resume_from=path)
            assert resumed.metrics == pytest.approx(whole.metrics, abs=self.tolerance), f"saved on {size}, resumed on 1"

    def test_predictions_come_back_in_order(self) -> None:
        expected = programs.predict("cpu")
        for size in self.sizes():
            found = programs.predict(self.accelerator, strategy=self.make(), devices=size)
            assert found.flatten().tolist() == pytest.approx(expected.flatten().tolist(), abs=self.tolerance)


class _Linear(nn.Module):
    """What is trained: a plain module with a training step, and a tensor of every kind."""

    automatic_optimization = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 1)
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.first(x).tanh()) + self.shift
        return output

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(x), y)


def _fits(parse_devices: Callable[[Any], list[int]], size: int) -> bool:
    with contextlib.suppress(ValueError, RuntimeError):
        return len(parse_devices(size)) == size
    return False


def _on_rank(
    ranks: Ranks, strategy: Strategy, accelerator: Any, devices: list[Any], function: Callable[..., Any], args: Any
) -> list[Any]:
    """Connect, call, disconnect; every rank's answer, by rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy.connect(accelerator, devices[ranks.local_rank], ranks)
        try:
            return distributed.gather_objects(function(strategy, *args))
        finally:
            strategy.disconnect()


def _place(strategy: Strategy) -> tuple[Any, ...]:
    """Where this rank is."""
    mine = (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size)
    return (*mine, strategy.is_global_zero, strategy.root_device.type)


def _reduce(strategy: Strategy) -> tuple[dict[str, float], float]:
    mine = torch.tensor(strategy.global_rank + 1.0, device=strategy.root_device)
    reduced = {op: strategy.reduce(mine, reduce_op=op).item() for op in ("sum", "mean", "min", "max", "product")}
    return reduced, mine.item()


def _gather(strategy: Strategy) -> tuple[Any, Any, Any]:
    mine = torch.tensor([float(strategy.global_rank), 1.0], device=strategy.root_device, requires_grad=True)
    plain = strategy.all_gather(mine.detach())
    with_gradient = strategy.all_gather(mine, sync_grads=True)
    with_gradient.square().sum().backward()
    assert mine.grad is not None
    return plain.tolist(), with_gradient.tolist(), mine.grad.tolist()


def _broadcast(strategy: Strategy) -> list[Any]:
    return [strategy.broadcast({"rank": strategy.global_rank}, src=source) for source in range(strategy.world_size)]


def _barrier(strategy: Strategy, path: Path) -> bool:
    if strategy.global_rank == strategy.world_size - 1:
        time.sleep(0.2)
        path.touch()
    strategy.barrier("conformance")
    return path.exists()


def _decide(strategy: Strategy) -> tuple[bool, ...]:
    mine, decide = strategy.global_rank == 0, strategy.reduce_boolean_decision
    return decide(mine), decide(mine, all=False), decide(True), decide(False, all=False)


def _batches(strategy: Strategy | None, count: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of `count` batches of 4 samples each; all of each without a strategy."""
    x = torch.randn(4 * count, 3, generator=torch.Generator().manual_seed(6))
    rank, size, device = (0, 1, CPU)
    if strategy is not None:
        rank, size, device = strategy.global_rank, strategy.world_size, strategy.root_device
    return [(mine[rank::size].to(device), mine[rank::size].sum(1, keepdim=True).to(device)) for mine in x.split(4)]


def _prepared(strategy: Strategy | None, kind: Any = torch.optim.SGD) -> tuple[_Linear, Any, torch.optim.Optimizer]:
    """Module, training step and optimizer: the strategy's, or those of a plain loop."""
    module = _Linear()
    step = module.training_step if strategy is None else strategy.setup(module, training=True)
    return module, step, kind(module.parameters(), lr=LEARNING_RATE)


def _weights(strategy: Strategy | None, module: nn.Module) -> dict[str, list[float]]:
    state = module.state_dict() if strategy is None else strategy.whole(strategy.module_state_dict())
    return {name: value.flatten().tolist() for name, value in distributed.broadcast_object(_on_cpu(state)).items()}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _steps(strategy: Strategy | None) -> dict[str, Any]:
    module, step, optimizer = _prepared(strategy)
    for batch in _batches(strategy, 3):
        optimizer.zero_grad()
        step(*batch).backward()
        optimizer.step()
    return _weights(strategy, module)


def _accumulated(strategy: Strategy | None) -> dict[str, Any]:
    module, step, optimizer = _prepared(strategy)
    for window in (2, 1):
        optimizer.zero_grad()
        for index, batch in enumerate(_batches(strategy, window)):
            last = strategy is None or index == window - 1
            with contextlib.nullcontext() if last else cast(Strategy, strategy).no_sync():
                (step(*batch) / window).backward()
        optimizer.step()
    return _weights(strategy, module)


def _clipped(strategy: Strategy | None, algorithm: str, value: float) -> dict[str, Any]:
    module, step, optimizer = _prepared(strategy)
    (batch,) = _batches(strategy, 1)
    step(*batch).backward()
    clip = Strategy.clip_gradients if strategy is None else type(strategy).clip_gradients
    norm = clip(cast(Strategy, strategy), list(module.parameters()), value, algorithm)
    optimizer.step()
    return {"norm": [0.0 if norm is None else float(norm)], **_weights(strategy, module)}


def _states_put_back(strategy: Strategy | None) -> dict[str, Any]:
    """A step, the states taken, a step that is undone by putting them back, and another step."""
    module, step, optimizer = _prepared(strategy, torch.optim.AdamW)
    first, second, third = _batches(strategy, 3)

    def train(batch: Any) -> None:
        optimizer.zero_grad()
        step(*batch).backward()
        optimizer.step()

    train(first)
    if strategy is None:
        state = optimizer.state_dict()
    else:
        whole = strategy.whole((strategy.module_state_dict(), strategy.optimizer_state_dict(optimizer)))
        # As a checkpoint has it: of rank zero, on the CPU, and no part of what goes on being trained.
        weights, state = pickle.loads(pickle.dumps(distributed.broadcast_object(_host(whole))))
        train(second)
        strategy.load_module_state(weights)
        strategy.load_optimizer_state(optimizer, state)
    moments = {
        f"{index}.{name}": value.flatten().tolist()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    train(third)
    return {**moments, **_weights(strategy, module)}


def _host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _host(item) for key, item in value.items()}
    return type(value)(map(_host, value)) if isinstance(value, (list, tuple)) else value


def _different_at_first(strategy: Strategy) -> float:
    """The loss of the same batch, on each rank."""
    module = _Linear()
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.add_(strategy.global_rank)
    step = cast(Callable[..., Tensor], strategy.setup(module, training=True))
    x = torch.ones(2, 3, device=strategy.root_device)
    return step(x, x.sum(1, keepdim=True)).item()


def _different_buffers(strategy: Strategy) -> list[float]:
    module = _Linear()
    strategy.setup(module, training=False)
    shift = module.get_buffer("shift")
    shift.fill_(strategy.global_rank)
    strategy.before_evaluation()
    values: list[float] = shift.tolist()
    return values


def _by_hand(strategy: Strategy | None) -> dict[str, Any]:
    module = _Linear()
    module.automatic_optimization = False
    if strategy is not None:
        strategy.setup(module, training=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    for batch in _batches(strategy, 2):
        optimizer.zero_grad()
        module.training_step(*batch).backward()
        if strategy is not None:
            strategy.sync_gradients(module.parameters())
        optimizer.step()
    return _weights(strategy, module)


def _own_loop(strategy: Strategy | None) -> dict[str, Any]:
    module: nn.Module = _Linear()
    wrapped = module
    if strategy is not None:
        strategy.accelerator.move_module(module, strategy.root_device)
        wrapped = strategy.wrap(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    for x, y in _batches(strategy, 2):
        optimizer.zero_grad()
        output = module(x) if wrapped is module else wrapped("forward", x)
        nn.functional.mse_loss(output, y).backward()
        optimizer.step()
    state = module.state_dict() if strategy is None else strategy.whole(module.state_dict())
    return {name: value.flatten().tolist() for name, value in distributed.broadcast_object(_on_cpu(state)).items()}


def _torn_down(strategy: Strategy) -> tuple[Any, ...]:
    module, step, optimizer = _prepared(strategy)
    (batch,) = _batches(strategy, 1)
    step(*batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    strategy.teardown()
    tensors = [*module.parameters(), *module.buffers()]
    wrapped = any(type(tensor.detach()) is not Tensor for tensor in tensors)
    devices = {tensor.device.type for tensor in tensors}
    return strategy.module is module, devices, type(module).__name__, wrapped, list(module(torch.ones(1, 3)).shape[1:])
