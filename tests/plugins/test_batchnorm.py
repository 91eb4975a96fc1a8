"""Batch normalization over ranks: what one process computes over all their batches together."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl
from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Strategy
from lightlite.plugins import batchnorm
from lightlite.plugins.cpu import CPUAccelerator
from lightlite.plugins.ddp import DDPStrategy

SIZES = {"even": (4, 4), "uneven": (5, 2), "one empty": (6, 0)}
LAYERS = {
    "2d": (lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "1d": (lambda: nn.BatchNorm1d(3, momentum=None), (3,)),
    "bare": (lambda: nn.BatchNorm3d(3, affine=False, track_running_stats=False), (3, 2, 2, 2)),
}


def layer_of(name: str) -> nn.Module:
    make, _ = LAYERS[name]
    layer = make().double()
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.detach().copy_(torch.rand(3, generator=generator) + 0.5)
    return layer


def data_of(name: str, sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(sum(sizes), *LAYERS[name][1], generator=generator, dtype=torch.double) * 3 + 5
    return list(whole.split(sizes))


def passes(layer: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of two forward passes and one backward."""
    inputs = inputs.clone().requires_grad_()
    layer(inputs.detach() / 2)
    output = layer(inputs)
    output.pow(3).sum().backward()
    found = {"output": output.detach(), "input": inputs.grad, **layer.state_dict()}
    return {**found, **{f"gradient of {name}": p.grad for name, p in layer.named_parameters()}}


def on_ranks(ranks: Ranks) -> dict[tuple[str, str], dict[str, Tensor]]:
    strategy = DDPStrategy()
    strategy.connect(CPUAccelerator(), torch.device("cpu"), ranks)
    found = {}
    for name in LAYERS:
        for case, sizes in SIZES.items():
            layer = layer_of(name)
            batchnorm.synchronize(layer)
            found[name, case] = passes(layer, data_of(name, sizes)[ranks.rank])
            for key in found[name, case]:
                if key.startswith("gradient of"):
                    found[name, case][key] = distributed.all_reduce(found[name, case][key], "sum")
    strategy.disconnect()
    return found


def test_ranks_normalize_as_one_process_does_their_batches_together() -> None:
    per_rank = run_ranks(2, on_ranks)
    for name in LAYERS:
        for case, sizes in SIZES.items():
            one = passes(layer_of(name), torch.cat(data_of(name, sizes)))
            several = [found[name, case] for found in per_rank]
            for key, expected in one.items():
                if key in ("output", "input"):
                    torch.testing.assert_close(torch.cat([found[key] for found in several]), expected)
                else:
                    for found in several:
                        torch.testing.assert_close(found[key], expected)


class Normalizing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)).double()
        self.kinds: set[type] = set()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.kinds.add(type(self.net[1]))
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def test_sync_batchnorm_trains_as_one_process_and_gives_the_bare_module_back(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(26, 4, generator=torch.Generator().manual_seed(5), dtype=torch.double))
    trained = []
    for ranks, size in ((1, 8), (2, 4)):
        module = Normalizing()
        layer = module.net[1]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=ranks,
            sync_batchnorm=True,
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(data, batch_size=size))
        assert module.net[1] is layer
        assert type(layer) is nn.BatchNorm1d
        assert module.kinds == {nn.BatchNorm1d if ranks == 1 else batchnorm.SyncedBatchNorm}
        trained.append(module.state_dict())
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, rtol=1e-6, atol=1e-6)


def test_a_synced_layer_alone_is_an_ordinary_one_and_can_be_kept() -> None:
    for name in LAYERS:
        (inputs,) = data_of(name, (6,))
        layer = layer_of(name)
        former = batchnorm.synchronize(layer)
        kept = pickle.loads(pickle.dumps(layer))
        assert isinstance(kept, nn.SyncBatchNorm)
        torch.testing.assert_close(passes(kept, inputs), passes(layer_of(name), inputs), rtol=0, atol=0)
        torch.testing.assert_close(kept.eval()(inputs), passed_in_evaluation(name, inputs), rtol=0, atol=0)
        batchnorm.restore(former)
        assert type(layer) is type(layer_of(name))


def passed_in_evaluation(name: str, inputs: Tensor) -> Tensor:
    layer = layer_of(name)
    passes(layer, inputs)
    output: Tensor = layer.eval()(inputs)
    return output


def test_a_strategy_that_cannot_says_so() -> None:
    class Plain(Strategy):
        name = "plain"

        def setup(self, module: nn.Module, training: bool) -> None:
            pass

    with pytest.raises(MisconfigurationException, match="sync_batchnorm=True, but Plain cannot"):
        Plain().synchronize_batchnorm(nn.BatchNorm1d(2))
