"""A loop of one's own on two ranks, started from the script: the numbers of one process, and one writer of files."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightlite.errors import MisconfigurationException
from lightlite.fabric import Fabric, is_wrapped
from lightlite.fabric.loggers import CSVLogger
from lightlite.fabric.utilities import is_shared_filesystem, suggested_max_num_workers

from .loops import Net, by_fabric, by_hand, distance, equal, weights


@pytest.fixture(scope="module", autouse=True)
def _warm_helpers() -> Iterator[None]:
    """Helpers that wait from test to test, rather than start anew."""
    fabric = two_ranks()
    fabric.launch(lambda fabric: None)
    yield
    del fabric


def two_ranks(**options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=2, **options)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip": {"max_norm": 0.1}}], ids=str)
def test_two_ranks_are_one_process_with_twice_the_batch(options: dict[str, Any]) -> None:
    def both(fabric: Fabric) -> Any:
        mine = by_fabric(fabric, batch_size=4, **options)
        states = [fabric.broadcast(mine, src=rank) for rank in range(2)]
        return mine, equal(*states)

    clip = None if "clip" not in options else (lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1))
    expected = by_hand(batch_size=8, accumulate=options.get("accumulate", 1), clip=clip)
    trained, alike = two_ranks().launch(both)
    assert alike
    assert distance(trained, expected) < 1e-6


def test_modules_of_the_script_are_trained_in_place_and_bare_again() -> None:
    net = Net()
    before = weights(net)

    def train(fabric: Fabric, rounds: int, *, rate: float) -> Any:
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=rate))
        for _ in range(rounds):
            fabric.backward(model(torch.ones(1, 4) + fabric.global_rank).sum())
            optimizer.step()
        return model

    fabric = two_ranks()
    model = fabric.launch(train, 2, rate=0.1)
    assert not equal(before, weights(net))
    assert model.module is net
    assert torch.equal(model(torch.ones(1, 4)), net(torch.ones(1, 4)))
    assert fabric.launch(lambda fabric: fabric.all_reduce(1.0, reduce_op="sum").item()) == 2.0


def test_ranks_begin_with_one_random_state() -> None:
    torch.manual_seed(11)
    expected = torch.Generator().manual_seed(11)
    drawn = two_ranks().launch(lambda fabric: fabric.all_gather(torch.rand(3)))
    assert torch.equal(drawn[0], torch.rand(3, generator=expected))
    assert torch.equal(drawn[0], drawn[1])


def test_gathered_tensors_carry_gradients_back_if_asked_to() -> None:
    def gather(fabric: Fabric) -> Any:
        value = torch.tensor([2.0, 3.0], requires_grad=True)
        everyones = fabric.all_gather({"value": value * (fabric.global_rank + 1)}, sync_grads=True)["value"]
        (everyones * torch.tensor([[1.0], [10.0]])).sum().backward()
        plain = fabric.all_gather(value)
        return everyones.detach(), fabric.all_gather(value.grad), plain.requires_grad

    everyones, gradients, requires_grad = two_ranks().launch(gather)
    assert everyones.tolist() == [[2.0, 3.0], [4.0, 6.0]]
    # each rank's loss counts rank zero's value once and rank one's tenfold, doubled
    assert gradients.tolist() == [[2.0, 2.0], [40.0, 40.0]]
    assert not requires_grad


def test_numbers_and_arrays_are_gathered_from_any_container() -> None:
    def gather(fabric: Fabric) -> Any:
        rank = fabric.global_rank
        held = collections.defaultdict(list, number=rank)
        pair, array = fabric.all_gather((Pair(rank, 0.5), np.full(2, rank)))
        return pair, array, dict(fabric.all_gather(held)), fabric.all_reduce(np.float32(rank), reduce_op="sum")

    pair, array, held, reduced = two_ranks().launch(gather)
    assert isinstance(pair, Pair)
    assert (pair.one.tolist(), pair.two.tolist()) == ([0, 1], [0.5, 0.5])
    assert array.tolist() == [[0, 0], [1, 1]]
    assert held["number"].tolist() == [0, 1]
    assert reduced.item() == 1.0


class Pair(NamedTuple):
    one: Any
    two: Any


def test_tensors_are_reduced_in_place() -> None:
    def reduce(fabric: Fabric) -> Any:
        tensor = torch.tensor([1.0 + fabric.global_rank])
        integers = torch.tensor([fabric.global_rank])
        mean = fabric.all_reduce({"a": tensor, "b": integers})
        return tensor, mean, fabric.all_reduce(integers, reduce_op=torch.distributed.ReduceOp.MAX), integers

    tensor, mean, largest, integers = two_ranks().launch(reduce)
    assert tensor.tolist() == [1.5]
    assert {name: value.tolist() for name, value in mean.items()} == {"a": [1.5], "b": [0.5]}
    assert largest.tolist() == integers.tolist() == [1]


def test_rank_zero_goes_first_writes_alone_and_all_load(tmp_path: Path) -> None:
    def work(fabric: Fabric) -> Any:
        flag = tmp_path / "downloaded"
        with fabric.rank_zero_first():
            found = flag.exists()
            flag.touch()
        pids = fabric.all_gather(os.getpid())
        model = fabric.setup(nn.Linear(2, 1))
        fabric.save(tmp_path / "state.ckpt", {"model": model, "rank": fabric.global_rank})
        state = {"model": model, "rank": 5}
        fabric.load(tmp_path / "state.ckpt", state)
        fabric.log("loss", float(fabric.global_rank), step=0)
        shared = is_shared_filesystem(fabric.strategy, tmp_path)
        return fabric.all_gather([found, state["rank"], shared]), len(set(pids.tolist())), fabric.logger.log_dir

    (found, rank, shared), processes, folder = two_ranks(loggers=CSVLogger(tmp_path)).launch(work)
    assert found.tolist() == [False, True]
    assert rank.tolist() == [0, 0]
    assert shared.tolist() == [True, True]
    assert processes == 2
    assert (Path(folder) / "metrics.csv").read_text().split() == ["loss,step", "0.0,0"]
    assert torch.load(tmp_path / "state.ckpt", weights_only=True)["model"].keys() == {"weight", "bias"}


def test_evaluation_deals_whole_batches_each_once_and_ranks_may_get_fewer() -> None:
    def evaluate(fabric: Fabric) -> Any:
        net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        model = fabric.setup(net)
        fabric.backward(model(torch.tensor([[1.0], [3.0]]) * (1 + fabric.global_rank)).sum())
        model.eval()
        means = fabric.all_gather(net[1].running_mean)
        data = TensorDataset(torch.arange(5.0).unsqueeze(1))
        loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2), evaluation=True)
        seen = []
        with torch.no_grad():
            for (x,) in loader:
                model(x)
                seen.append(x.flatten().tolist())
        everyones = [fabric.broadcast(seen, src=rank) for rank in range(2)]
        return means, len(loader), everyones

    means, length, seen = two_ranks().launch(evaluate)
    assert torch.equal(means[0], means[1])
    assert length == 2
    assert seen == [[[0.0, 1.0], [4.0]], [[2.0, 3.0]]]


def test_a_method_that_would_bypass_the_wrapper_says_what_to_do() -> None:
    def call(fabric: Fabric) -> Any:
        model = fabric.setup(Net())
        x, y = torch.ones(2, 4) * (1 + fabric.global_rank), torch.zeros(2, 1)
        with torch.no_grad():
            model.loss(x, y)
        try:
            model.loss(x, y)
        except MisconfigurationException as error:
            message = str(error)
        model.mark_forward_method("loss")
        fabric.backward(model.loss(x, y))
        gradients = fabric.all_gather(model.last.weight.grad)
        return message, torch.equal(gradients[0], gradients[1])

    message, alike = two_ranks().launch(call)
    assert message.startswith("Net.loss() was called and runs the model, but not through its forward")
    assert "model.mark_forward_method('loss')" in message
    assert alike


def test_two_modules_are_synced_each_by_itself() -> None:
    def adversaries(fabric: Fabric) -> Any:
        one, two = fabric.setup(nn.Linear(4, 4)), fabric.setup(nn.Linear(4, 1))
        x = torch.ones(2, 4) * (1 + fabric.global_rank)
        with fabric.no_backward_sync(two):
            fabric.backward(two(one(x)).sum())
        return fabric.all_gather([one.weight.grad, two.weight.grad])

    one, two = two_ranks().launch(adversaries)
    assert torch.equal(one[0], one[1])
    assert not torch.equal(two[0], two[1])


def test_backward_without_a_module_that_was_set_up_is_refused() -> None:
    def train(fabric: Fabric) -> None:
        fabric.backward(nn.Linear(1, 1)(torch.ones(1, 1)).sum())

    with pytest.raises(MisconfigurationException, match="before any module was set up"):
        two_ranks().launch(train)


def test_nothing_is_set_up_before_the_ranks_are_there() -> None:
    fabric = two_ranks()
    for call in (
        lambda: fabric.setup(Net()),
        lambda: fabric.setup_dataloaders(DataLoader([1])),
        lambda: fabric.barrier(),
        lambda: fabric.all_gather(1),
        lambda: fabric.save("x", {}),
    ):
        with pytest.raises(MisconfigurationException, match="asks for 2 ranks, and nobody has started them yet"):
            call()


def test_a_subclass_runs_on_every_rank() -> None:
    class Mine(Fabric):
        def run(self, more: float) -> Any:
            return self.all_gather(self.global_rank + more).tolist()

    assert Mine(accelerator="cpu", devices=2).run(0.5) == [0.5, 1.5]


def test_a_rank_may_have_its_share_of_workers() -> None:
    assert suggested_max_num_workers(10_000) == 1
    with pytest.raises(MisconfigurationException, match="local_world_size=0"):
        suggested_max_num_workers(0)
    assert not is_wrapped(object())
