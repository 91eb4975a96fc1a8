from __future__ import annotations

import copy
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from ranks import in_another_run, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.functional import cross_entropy

import lightlite as pl
from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.ddp import DDPStrategy
from lightlite.plugins.precision import TruePrecision
from lightlite.plugins.single import SingleDeviceStrategy
from lightlite.registry import StrategyRegistry
from lightlite.saving import TorchCheckpointIO

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two layers and a buffer; `heads` of which each batch uses those it names."""

    automatic_optimization = True

    def __init__(self, width: int = 8, heads: int = 1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width, momentum=0.5, affine=False), nn.ReLU())
        self.body[1].eval()
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(heads))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, head: int = 0) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.heads[head](self.body(inputs)), targets)


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def big_batch_gradients(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    net = Net()
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    net.training_step((inputs, targets), 0).backward()
    return gradients(net)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def connected(ranks: Ranks, **options: Any) -> DDPStrategy:
    strategy = DDPStrategy(**options)
    strategy.connect(CPUAccelerator(), CPU, in_another_run(ranks))
    return strategy


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def one_step(ranks: Ranks, **options: Any) -> tuple[dict[str, Tensor], Any]:
    strategy, net = connected(ranks, **options), Net(seed=ranks.rank)  # other weights: those of rank 0 count
    step = strategy.setup(net, training=True)
    assert step is not None
    step(batches(2)[ranks.rank], 0).backward()
    found = gradients(net)
    strategy.teardown()
    strategy.disconnect()
    net.training_step(batches(1)[0], 0).backward()
    twin = copy.deepcopy(net)
    names = list(cloudpickle.loads(cloudpickle.dumps(twin)).state_dict())
    return found, (names, distributed.is_joined())


def test_gradients_equal_those_of_the_big_batch_and_the_module_comes_out_as_it_was() -> None:
    for found, (names, joined) in run_ranks(2, one_step):
        assert_close(found, big_batch_gradients(batches(2)))
        assert names == list(Net().state_dict())
        assert not joined


def test_options_reach_the_wrapper_and_hooks_compress_gradients() -> None:
    for found in run_ranks(2, compressed_step):
        exact = big_batch_gradients(batches(2))
        assert found.keys() == exact.keys()
        assert not torch.equal(found["body.0.weight"], exact["body.0.weight"])
        for name in exact:
            torch.testing.assert_close(found[name], exact[name], rtol=1e-2, atol=1e-2)


def compressed_step(ranks: Ranks) -> dict[str, Tensor]:
    return one_step(ranks, ddp_comm_hook=fp16_compress_hook, broadcast_buffers=False, bucket_cap_mb=1)[0]


def accumulate(ranks: Ranks) -> tuple[bool, dict[str, Tensor]]:
    strategy, net = connected(ranks), Net()
    step = strategy.setup(net, training=True)
    assert step is not None
    mine = batches(6)[ranks.rank :: 2]
    with strategy.no_sync():
        for index, batch in enumerate(mine[:-1]):
            (step(batch, index) / len(mine)).backward()
    weight = net.heads[0].weight.grad
    assert weight is not None
    local = len({tuple(part.flatten().tolist()) for part in distributed.all_gather(weight)}) == 2
    (step(mine[-1], 2) / len(mine)).backward()
    found = gradients(net)
    strategy.teardown()
    strategy.disconnect()
    return local, found


def test_accumulated_gradients_stay_local_until_the_last_and_equal_the_big_batch() -> None:
    for local, found in run_ranks(2, accumulate):
        assert local
        assert_close(found, big_batch_gradients(batches(6)))


def sparse(ranks: Ranks) -> list[float]:
    class Embedded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True)

        def training_step(self, batch: Tensor, *_: Any) -> Tensor:
            return self.table(batch).square().sum() + 0 * sum(p.sum() for p in self.body.parameters())

    strategy, net = connected(ranks), Embedded()
    net.heads = nn.ModuleList()
    step = strategy.setup(net, training=True)
    assert step is not None
    step(torch.tensor([ranks.rank]), 0).backward()
    assert net.table.weight.grad is not None
    rows: list[float] = (net.table.weight.grad.to_dense() / net.table.weight).mean(1).tolist()
    strategy.teardown()
    strategy.disconnect()
    return rows


def test_sparse_gradients_are_averaged() -> None:
    for rows in run_ranks(2, sparse):
        assert rows == [1, 1, 0, 0, 0]  # 2 w of one rank's two


def by_hand(ranks: Ranks) -> tuple[dict[str, Tensor], bool, dict[str, Tensor]]:
    strategy, net = connected(ranks), Net(heads=3, seed=ranks.rank)
    net.automatic_optimization = False
    net.body[0].bias.requires_grad_(False)
    step = strategy.setup(net, training=True)
    assert step is not None
    start = net.state_dict()["body.0.weight"].clone()
    step(batches(2)[ranks.rank], 0, head=ranks.rank).backward()  # rank 0 uses head 0, rank 1 head 1, nobody head 2
    strategy.sync_gradients(net.parameters())
    found = gradients(net)
    strategy.teardown()
    strategy.disconnect()
    return found, step == net.training_step, {"start": start}


def test_gradients_synced_by_hand_count_a_rank_that_has_none_as_zero() -> None:
    expected: dict[str, Tensor] = {}
    for rank, batch in enumerate(batches(2)):
        net = Net(heads=3)
        net.body[0].bias.requires_grad_(False)
        (net.training_step(batch, 0, head=rank) / 2).backward()
        for name, gradient in gradients(net).items():
            expected[name] = expected.get(name, 0) + gradient
    assert "heads.2.weight" not in expected
    for found, bare, start in run_ranks(2, by_hand):
        assert_close(found, expected)
        assert bare
        assert torch.equal(start["start"], Net(heads=3).body[0].weight), "rank 0's weights were not sent out"


def different_modules(ranks: Ranks) -> list[str]:
    strategy, messages = connected(ranks), []
    for net in (Net(width=8 + ranks.rank), Net(heads=1 + ranks.rank), Net().double() if ranks.rank else Net()):
        with pytest.raises(MisconfigurationException) as caught:
            strategy.setup(net, training=True)
        messages.append(str(caught.value))
    strategy.disconnect()
    return messages


def test_a_differing_module_is_refused_on_every_rank_and_named() -> None:
    results = run_ranks(2, different_modules)
    assert results[0] == results[1]
    shape, missing, dtype = results[0]
    assert "'body.0.weight', shape (8, 4) of torch.float32 on rank 0" in shape
    assert "'body.0.weight', shape (9, 4) of torch.float32 on rank 1" in shape
    assert "'heads.1.weight', shape (3, 8) of torch.float32 on rank 1" in missing
    assert "torch.float32 on rank 0, and 'body.0.weight', shape (8, 4) of torch.float64 on rank 1" in dtype


def evaluation(ranks: Ranks) -> list[dict[str, Tensor]]:
    strategy, net, states = connected(ranks), Net(seed=ranks.rank), []
    net.register_buffer("flags", torch.tensor([ranks.rank == 0, True]))
    net.register_buffer("phase", torch.tensor(1j + ranks.rank))
    assert strategy.setup(net, training=False) is None
    states.append(copy.deepcopy(strategy.module_state_dict()))
    net.body[1].train()
    net.body(batches(2)[ranks.rank][0])
    strategy.before_evaluation()
    states.append(copy.deepcopy(strategy.module_state_dict()))
    strategy.teardown()
    strategy.disconnect()
    return states


def test_modules_are_equal_before_evaluation_buffers_included() -> None:
    (first, after), (other, other_after) = run_ranks(2, evaluation)
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(first, other, **exact)
    torch.testing.assert_close(after, other_after, **exact)
    assert torch.equal(first["body.0.weight"], Net().body[0].weight)
    assert first["flags"].tolist() == [True, True]
    assert not torch.equal(first["body.1.running_mean"], after["body.1.running_mean"])
    assert after["body.1.num_batches_tracked"].item() == 1


def unused(ranks: Ranks) -> list[str]:
    messages = []
    for options in ({}, {"gradient_as_bucket_view": False}):
        strategy, net = connected(ranks, **options), Net(heads=2)
        net.body[0].weight.requires_grad_(False)  # frozen, and so not among those that PyTorch counts
        step = strategy.setup(net, training=True)
        assert step is not None
        step(batches(1)[0], 0).backward()
        with pytest.raises(MisconfigurationException) as caught:
            step(batches(1)[0], 1)
        messages.append(str(caught.value))
        strategy.teardown()
        strategy.disconnect()
    for options in ({"static_graph": True}, {"find_unused_parameters": True}):
        strategy = connected(ranks, **options)
        step = strategy.setup(Net(heads=2), training=True)
        assert step is not None
        for index in range(3):
            step(batches(1)[0], index).backward()
        strategy.teardown()
        strategy.disconnect()
    return messages


def test_unused_parameters_are_named() -> None:
    for rank, messages in enumerate(run_ranks(2, unused)):
        assert len(messages) == 2
        for message in messages:
            assert f"on rank {rank}: heads.1.weight, heads.1.bias." in message
            assert 'strategy="ddp_find_unused_parameters_true"' in message


def test_lightnings_names_are_those_of_the_one_way() -> None:
    for name in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"):
        for suffix, unused in (
            ("", False),
            ("_find_unused_parameters_true", True),
            ("_find_unused_parameters_false", False),
        ):
            strategy = StrategyRegistry.create(name + suffix)
            assert type(strategy) is DDPStrategy
            assert strategy.options["find_unused_parameters"] is unused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accelerator": "cpu"}, r"give Trainer\(accelerator=…, devices=…\) instead"),
        ({"parallel_devices": [CPU]}, r"give Trainer\(accelerator=…, devices=…\) instead"),
        ({"start_method": "thread"}, "allowed are 'popen', 'spawn', 'fork', 'forkserver'"),
        ({"device_ids": [0]}, r"device_ids=…\): give Trainer\(devices=…\) instead"),
        ({"find_unused": True}, "has no such option; it has .*find_unused_parameters"),
    ],
)
def test_what_is_not_for_the_strategy_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        DDPStrategy(**arguments)


def test_what_lightning_gives_the_strategy_reaches_the_trainer() -> None:
    writer, precision = TorchCheckpointIO(), TruePrecision("64-true")
    strategy = DDPStrategy(checkpoint_io=writer, precision_plugin=precision, start_method="spawn")
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    assert trainer.strategy.checkpoint_io is writer
    assert trainer.precision_plugin is precision


def failing(ranks: Ranks) -> str:
    class Failing(Net):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            raise RuntimeError("of the user's own")

    strategy = connected(ranks, find_unused_parameters=True)
    step = strategy.setup(Failing(), training=True)
    assert step is not None
    with pytest.raises(RuntimeError, match="of the user's own") as caught:
        step(batches(1)[0], 0)
    strategy.teardown()
    strategy.disconnect()
    return type(caught.value).__name__


def test_a_users_own_exception_passes_through() -> None:
    assert run_ranks(2, failing) == ["RuntimeError"] * 2


def lifetimes(ranks: Ranks) -> list[bool]:
    seen = []
    strategy = connected(ranks)
    seen.append(dist.is_initialized())
    strategy.barrier()
    strategy.disconnect()
    seen.append(dist.is_initialized())
    host, port = ranks.store or ("", 0)
    ranks = Ranks(ranks.rank, ranks.local_rank, 0, ranks.world_size, ranks.local_world_size, None)
    store = dist.TCPStore(host, port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("own", store), rank=ranks.rank, world_size=2)
    strategy = connected(ranks)
    assert strategy.reduce(torch.tensor(ranks.rank + 1.0), reduce_op="sum").item() == 3
    strategy.disconnect()
    seen.append(dist.is_initialized())
    dist.destroy_process_group()
    return seen


def test_a_group_lives_for_its_run_and_one_that_stood_before_lives_on() -> None:
    assert run_ranks(2, lifetimes) == [[True, False, True]] * 2


@pytest.mark.parametrize("strategy_class", [SingleDeviceStrategy, DDPStrategy])
def test_one_rank_calls_the_bare_training_step(strategy_class: type[SingleDeviceStrategy] | type[DDPStrategy]) -> None:
    strategy, net = strategy_class(), Net()
    strategy.connect(CPUAccelerator(), CPU, Ranks())
    assert strategy.setup(net, training=True) == net.training_step
    assert strategy.setup(net, training=False) is None
    strategy.before_evaluation()
    strategy.sync_gradients(net.parameters())
    with strategy.no_sync():
        pass
    assert list(strategy.module_state_dict()) == list(net.state_dict())
    strategy.teardown()
    strategy.disconnect()
    assert not distributed.is_joined()


def test_lazy_layers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    strategy = DDPStrategy()
    strategy.connect(CPUAccelerator(), CPU, Ranks())
    strategy.ranks = Ranks(world_size=2)
    with pytest.raises(MisconfigurationException, match=r"'1\.weight' has no shape yet"):
        strategy.setup(net, training=False)
