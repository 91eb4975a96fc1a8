"""Optimizers' steps: the hooks that change them, clipping, accumulation, and optimization by hand."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightlite as pl
from lightlite.errors import MisconfigurationException

from .models import TRAINING_ALONE, Net, assert_same_bits, quiet_trainer, regression_loader, weights

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class ManualNet(Net):
    """Steps one optimizer by hand."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def seeded(module_type: type[Net], *args: Any) -> Any:
    torch.manual_seed(2)
    return module_type(*args)


def test_optimization_by_hand_is_the_automatic_one(tmp_path: Path) -> None:
    automatic, manual = seeded(Net), seeded(ManualNet)
    for module in (automatic, manual):
        trainer = quiet_trainer(tmp_path, max_epochs=2)
        trainer.fit(module, regression_loader(3))
        assert trainer.global_step == 6
    assert_same_bits(weights(manual), weights(automatic))


def test_a_closure_serves_optimization_by_hand(tmp_path: Path) -> None:
    class WithClosure(ManualNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()

            def closure() -> Any:
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    with_closure, plain = seeded(WithClosure), seeded(ManualNet)
    for module in (with_closure, plain):
        quiet_trainer(tmp_path).fit(module, regression_loader(3))
    assert_same_bits(weights(with_closure), weights(plain))


def test_clip_gradients_by_hand(tmp_path: Path) -> None:
    norms: list[float] = []

    class Clips(ManualNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))
            optimizer.step()

    quiet_trainer(tmp_path).fit(Clips(), regression_loader(2))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_two_optimizers_with_toggling_train_their_own_parameters(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Adversarial(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                seen.append((self.left.weight.requires_grad, self.right.weight.requires_grad))
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.right(self.left(batch[0])), batch[1]))
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            seen.append((self.left.weight.requires_grad, self.right.weight.requires_grad))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.left, self.right)]

    module = Adversarial()
    before = weights(module)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, regression_loader(1))
    assert seen == [(True, False), (False, True), (True, True)]
    after = weights(module)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_clipping_and_accumulation_are_refused_with_optimization_by_hand(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="gradient_clip_val"):
        quiet_trainer(tmp_path, gradient_clip_val=1.0).fit(ManualNet(), regression_loader(1))
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):
        quiet_trainer(tmp_path, accumulate_grad_batches=2).fit(ManualNet(), regression_loader(1))


def test_optimizer_step_overridden_decides_when_to_step(tmp_path: Path) -> None:
    class EverySecond(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    seen: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.before = pl_module.layer.weight.detach().clone()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(torch.equal(self.before, pl_module.layer.weight))

    quiet_trainer(tmp_path, callbacks=[Watch()]).fit(EverySecond(), regression_loader(4))
    assert seen == [True, False, True, False]


def test_learning_rate_warm_up_in_optimizer_step(tmp_path: Path) -> None:
    rates: list[float] = []

    class WarmUp(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (self.trainer.global_step + 1)
            rates.append(optimizer.param_groups[0]["lr"])

    quiet_trainer(tmp_path).fit(WarmUp(), regression_loader(3))
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_optimizer_zero_grad_overridden_is_used(tmp_path: Path) -> None:
    class ToZero(Net):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            seen.append((epoch, batch_idx))
            optimizer.zero_grad(set_to_none=False)

    seen: list[Any] = []
    module, plain = seeded(ToZero), seeded(Net)
    quiet_trainer(tmp_path).fit(module, regression_loader(2))
    quiet_trainer(tmp_path).fit(plain, regression_loader(2))
    assert seen == [(0, 0), (0, 1)]
    assert_same_bits(weights(module), weights(plain))


def test_backward_overridden_is_used(tmp_path: Path) -> None:
    class Negated(Net):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            (-loss).backward()

    module, plain = seeded(Negated), seeded(Net)
    before = module.layer.weight.detach().clone()
    quiet_trainer(tmp_path).fit(module, regression_loader(1))
    quiet_trainer(tmp_path).fit(plain, regression_loader(1))
    torch.testing.assert_close(module.layer.weight - before, before - plain.layer.weight)


def test_configure_gradient_clipping_overridden_is_used(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    class Own(Net):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            seen.append((gradient_clip_val, gradient_clip_algorithm))
            for parameter in self.parameters():
                parameter.grad.zero_()

    module = Own()
    before = weights(module)
    trainer = quiet_trainer(tmp_path, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
    trainer.fit(module, regression_loader(2))
    assert [(value, str(getattr(algorithm, "value", algorithm))) for value, algorithm in seen] == [(0.5, "norm")] * 2
    assert_same_bits(weights(module), before)


def test_gradients_are_whole_in_on_before_optimizer_step_and_clipped_after_it(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(Net):
        def norm(self) -> float:
            return float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms.append(self.norm())

        def on_train_batch_end(self, *_: Any) -> None:
            norms.append(self.norm())

    quiet_trainer(tmp_path, gradient_clip_val=0.1).fit(Watch(), regression_loader(1))
    assert norms[0] > 0.2
    assert norms[1] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("windows", [2, 4])
def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path: Path, windows: int) -> None:
    small, big = seeded(Net), seeded(Net)
    quiet_trainer(tmp_path, accumulate_grad_batches=windows).fit(small, regression_loader(8, batch_size=2))
    quiet_trainer(tmp_path).fit(big, regression_loader(8 // windows, batch_size=2 * windows))
    torch.testing.assert_close(small.layer.weight, big.layer.weight, rtol=0, atol=1e-6)


def test_outputs_hold_the_loss_divided_by_accumulation_as_documented(tmp_path: Path) -> None:
    returned: list[float] = []
    ended: list[float] = []

    class Watch(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            returned.append(loss.item())
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ended.append(float(outputs["loss"]))

    quiet_trainer(tmp_path, accumulate_grad_batches=2).fit(Watch(), regression_loader(4))
    assert ended == [loss / 2 for loss in returned]


def test_a_frozen_parameter_stays(tmp_path: Path) -> None:
    module = Net()
    module.layer.bias.requires_grad_(False)
    before = weights(module)
    quiet_trainer(tmp_path).fit(module, regression_loader(2))
    assert torch.equal(module.layer.bias, before["layer.bias"])
    assert not torch.equal(module.layer.weight, before["layer.weight"])


def test_batches_may_be_any_nest_and_reach_the_step_unchanged(tmp_path: Path) -> None:
    Pair = namedtuple("Pair", ["x", "y"])

    @dataclass
    class Sample:
        pair: Any
        text: str

    seen: list[Any] = []

    class Watch(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch)
            return self.loss(batch["sample"].pair)

    class Loader:
        def __iter__(self) -> Any:
            for x, y in regression_loader(2):
                yield {"sample": Sample(Pair(x, y), "text"), "number": 3}

    quiet_trainer(tmp_path).fit(Watch(), Loader())
    for batch in seen:
        assert (type(batch["sample"].pair), batch["sample"].text, batch["number"]) == (Pair, "text", 3)


def test_64_bit_precision_trains_in_double(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watch(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.extend([batch[0].dtype, self.layer.weight.dtype])
            return super().training_step(batch, batch_idx)

    quiet_trainer(tmp_path, precision="64-true").fit(Watch(), regression_loader(1))
    assert seen == [torch.float64, torch.float64]


def test_bf16_mixed_precision_computes_in_bfloat16_and_keeps_float32(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watch(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.extend([self(batch[0]).dtype, self.layer.weight.dtype])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self(batch[0]).dtype)

    quiet_trainer(tmp_path, precision="bf16-mixed").fit(Watch(), regression_loader(1), regression_loader(1))
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_detect_anomaly_names_the_operation(tmp_path: Path) -> None:
    class NotANumber(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.loss(batch) * 0.0).sqrt() * 0.0

    with pytest.raises(RuntimeError, match="SqrtBackward"), pytest.warns(UserWarning, match="Sqrt"):
        quiet_trainer(tmp_path, detect_anomaly=True).fit(NotANumber(), regression_loader(1))


def test_configure_model_runs_before_optimizers_and_its_modules_train(tmp_path: Path) -> None:
    class Late(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = None

        def configure_model(self) -> None:
            if self.layer is None:
                self.layer = nn.Linear(4, 1)
                self.register_buffer("scale", torch.ones(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.device == self.layer.weight.device == self.scale.device
            return nn.functional.mse_loss(self.layer(batch[0]) * self.scale, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Late()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, regression_loader(2))
    assert trainer.global_step == 2
    assert module.layer.weight.grad is not None
