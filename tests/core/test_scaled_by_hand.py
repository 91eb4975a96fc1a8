"""A gradient scaler in manual optimization: what hooks see and what is clipped are the gradients themselves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import lightlite as pl
from lightlite.plugins import MixedPrecision

from .models import assert_same_bits, quiet_trainer, weights

BATCHES, SCALE, LARGEST_NORM = 3, 1024.0, 0.25
make_scaler = functools.partial(torch.amp.GradScaler, "cpu", init_scale=SCALE)


class TwoLayers(pl.LightningModule):
    """Each layer has an optimizer of its own, clips by hand, and steps by hand."""

    def __init__(self, both_first: bool, with_closures: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.both_first, self.with_closures = both_first, with_closures
        self.seen: list[float] = []

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.5) for layer in self.layers]

    def loss(self, batch: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](batch)).float().square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        if self.with_closures:
            for optimizer in optimizers:
                optimizer.step(closure=functools.partial(self.closure, batch, optimizer))
        elif self.both_first:
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in optimizers:
                self.clip_gradients(optimizer, LARGEST_NORM, "norm")
            for optimizer in optimizers:
                optimizer.step()
        else:
            for optimizer in optimizers:
                self.closure(batch, optimizer)
                optimizer.step()

    def closure(self, batch: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, LARGEST_NORM, "norm")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert not isinstance(optimizer, list)
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        self.seen.append(get_total_norm(gradients).item())


def by_hand(module: TwoLayers, batches: list[Tensor]) -> None:
    optimizers = module.configure_optimizers()
    scaler = make_scaler()

    def backward_and_clip(chosen: list[torch.optim.Optimizer], batch: Tensor) -> None:
        for optimizer in chosen:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = module.loss(batch)
        scaler.scale(loss).backward()
        for optimizer in chosen:
            scaler.unscale_(optimizer)
            clip_grad_norm_(optimizer.param_groups[0]["params"], LARGEST_NORM)

    for batch in batches:
        for chosen in [optimizers] if module.both_first else [[optimizer] for optimizer in optimizers]:
            backward_and_clip(chosen, batch)
            for optimizer in chosen:
                scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize(("both_first", "with_closures"), [(False, False), (True, False), (False, True)])
def test_clipping_by_hand_is_that_of_the_hand_written_loop(
    tmp_path: Path, both_first: bool, with_closures: bool
) -> None:
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(index)) for index in range(BATCHES)]
    expected, module = (TwoLayers(both_first, with_closures) for _ in range(2))
    by_hand(expected, batches)
    trainer = quiet_trainer(tmp_path, plugins=MixedPrecision("16-mixed", scaler=make_scaler()))
    trainer.fit(module, batches)
    assert_same_bits(weights(module), weights(expected))
    assert trainer.global_step == 2 * BATCHES
    assert len(module.seen) == 2 * BATCHES
    assert all(0 < norm <= LARGEST_NORM * 1.001 for norm in module.seen)


class Skips(pl.LightningModule):
    """Trains on every other batch, with clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 2 == 0 else self.layer(batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_skipped_batch_leaves_the_scaler_ready_for_the_next(tmp_path: Path) -> None:
    module = Skips()
    before = module.layer.weight.detach().clone()
    trainer = quiet_trainer(
        tmp_path, plugins=MixedPrecision("16-mixed", scaler=make_scaler()), gradient_clip_val=LARGEST_NORM
    )
    trainer.fit(module, [torch.randn(8, 4) for _ in range(4)])
    assert 0 < (module.layer.weight - before).norm() <= 2 * 0.1 * LARGEST_NORM * 1.001


class TwoSteps(TwoLayers):
    """One backward pass, then the steps of both, without clipping; batch by batch another scale."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


def test_the_scale_does_not_change_between_the_steps_of_two_optimizers(tmp_path: Path) -> None:
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(index)) for index in range(BATCHES)]
    expected, module = (TwoSteps(both_first=True, with_closures=False) for _ in range(2))
    for batch in batches:
        optimizers = expected.configure_optimizers()
        expected.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = expected.loss(batch)
        (loss * SCALE).backward()
        for parameter in expected.parameters():
            assert parameter.grad is not None
            parameter.grad /= SCALE  # a power of two: exact, whichever it is
        for optimizer in optimizers:
            optimizer.step()
    scaler = make_scaler(growth_interval=1)
    quiet_trainer(tmp_path, plugins=MixedPrecision("16-mixed", scaler=scaler)).fit(module, batches)
    assert_same_bits(weights(module), weights(expected))
    assert scaler.get_scale() == SCALE * 2**BATCHES
