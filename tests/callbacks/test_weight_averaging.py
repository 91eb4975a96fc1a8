from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import FEATURES, Net, assert_same_bits, quiet_trainer, regression_loader, weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightlite.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightlite.errors import MisconfigurationException

from .programs import SavesAfter


class NormNet(Net):
    """With batch normalization; keeps what was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            self.validated.append(weights(self))
        return super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def by_hand(net: NormNet, epochs: int, **options: Any) -> tuple[AveragedModel, list[dict[str, Tensor]]]:
    """The same as a loop: the average after each step, and what was to be validated after each epoch."""
    average, optimizer, seen = AveragedModel(net, use_buffers=True, **options), net.configure_optimizers(), []
    for _ in range(epochs):
        for batch in regression_loader(3, 4):
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()
            average.update_parameters(net)
        seen.append(weights(average.module))
    return average, seen


def twin(net: NormNet) -> NormNet:
    other = NormNet()
    other.load_state_dict(net.state_dict())
    return other


def fit(folder: Path, net: NormNet, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Any:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"callbacks": list(callbacks), "max_epochs": 3, "enable_checkpointing": saves, **settings}
    trainer = quiet_trainer(folder, **options)
    trainer.fit(net, regression_loader(3, 4), regression_loader(2, 4), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("callback", "options"),
    [(WeightAveraging, {}), (lambda: EMAWeightAveraging(decay=0.8), {"avg_fn": get_ema_avg_fn(0.8)})],
)
def test_the_average_is_torchs_of_a_hand_written_loop(
    tmp_path: Path, seeded: int, callback: Any, options: dict[str, Any]
) -> None:
    net = NormNet()
    expected, seen = by_hand(twin(net), 3, **options)
    fit(tmp_path, net, callback())
    assert_same_bits(weights(net), weights(expected.module))
    for actual, wanted in zip(net.validated, seen, strict=True):
        assert_same_bits(actual, wanted)


def test_a_checkpoint_holds_the_average_and_beside_it_what_is_trained(tmp_path: Path, seeded: int) -> None:
    net = NormNet()
    trained = twin(net)
    expected, _ = by_hand(trained, 2)
    fit(tmp_path, net, WeightAveraging(), ModelCheckpoint(tmp_path, save_top_k=-1))
    saved = torch.load(tmp_path / "epoch=1-step=6.ckpt", weights_only=True)
    assert_same_bits(saved["state_dict"], weights(expected.module))
    assert_same_bits(saved["current_model_state"], weights(trained))
    assert {name: int(value) for name, value in saved["averaging_state"].items()} == {"n_averaged": 6}
    assert saved["callbacks"]["WeightAveraging"] == {"latest_update_step": 6}


def test_a_checkpoint_of_weights_only_holds_the_average(tmp_path: Path, seeded: int) -> None:
    net = NormNet()
    _, seen = by_hand(twin(net), 2)
    fit(tmp_path, net, WeightAveraging(), ModelCheckpoint(tmp_path, save_top_k=-1, save_weights_only=True))
    assert_same_bits(torch.load(tmp_path / "epoch=1-step=6.ckpt", weights_only=True)["state_dict"], seen[1])


@pytest.mark.parametrize("moment", [(0, 1), (1, 0), (1, None), (2, None)])
def test_a_resumed_fit_ends_as_if_it_had_not_been_interrupted(tmp_path: Path, seeded: int, moment: Any) -> None:
    whole, resumed, path = NormNet(), NormNet(), tmp_path / "saved.ckpt"
    fit(tmp_path, whole, EMAWeightAveraging(decay=0.8), SavesAfter(path, *moment))
    fit(tmp_path, resumed, EMAWeightAveraging(decay=0.8), ckpt_path=path)
    assert_same_bits(weights(resumed), weights(whole))


@pytest.mark.parametrize("same", [True, False])
def test_the_average_of_a_checkpoint_is_what_is_evaluated(tmp_path: Path, seeded: int, same: bool) -> None:
    trainer = fit(tmp_path, NormNet(), EMAWeightAveraging(decay=0.8), ModelCheckpoint(tmp_path, save_top_k=-1))
    path, net = tmp_path / "epoch=1-step=6.ckpt", NormNet()
    if not same:
        trainer = quiet_trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.8)])
    trainer.validate(net, regression_loader(2, 4), ckpt_path=path, verbose=False)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert_same_bits(net.validated[0], saved)
    assert_same_bits(weights(net), saved)


def test_a_checkpoint_written_after_the_fit_goes_on_exactly(tmp_path: Path, seeded: int) -> None:
    whole, net, resumed = NormNet(), NormNet(), NormNet()
    net.load_state_dict(whole.state_dict())
    fit(tmp_path, whole, WeightAveraging(), max_epochs=3)
    fit(tmp_path, net, WeightAveraging(), max_epochs=2).save_checkpoint(tmp_path / "after.ckpt")
    assert_same_bits(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], weights(net))
    fit(tmp_path, resumed, WeightAveraging(), max_epochs=3, ckpt_path=tmp_path / "after.ckpt")
    assert_same_bits(weights(resumed), weights(whole))


def test_before_the_first_update_the_weights_that_are_trained_are_used(tmp_path: Path, seeded: int) -> None:
    net = NormNet()
    trained = twin(net)
    by_hand(trained, 1)
    late = EMAWeightAveraging(update_starting_at_step=5)
    fit(tmp_path, net, late, ModelCheckpoint(tmp_path, save_top_k=-1))
    assert_same_bits(net.validated[0], weights(trained))
    saved = torch.load(tmp_path / "epoch=0-step=3.ckpt", weights_only=True)
    assert_same_bits(saved["state_dict"], weights(trained))
    assert int(saved["averaging_state"]["n_averaged"]) == 0


def test_without_any_update_the_fit_ends_with_the_weights_that_were_trained(tmp_path: Path, seeded: int) -> None:
    net = NormNet()
    trained = twin(net)
    by_hand(trained, 3)
    with pytest.warns(UserWarning, match="EMAWeightAveraging never updated its average"):
        fit(tmp_path, net, EMAWeightAveraging(update_starting_at_step=100))
    assert_same_bits(weights(net), weights(trained))


class Asked(WeightAveraging):
    """Notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(device="cpu", use_buffers=False)
        self.asked: list[tuple[int | None, int | None]] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        self.asked.append((step_idx, epoch_idx))
        return epoch_idx is not None


def test_it_is_asked_after_every_step_and_every_epoch(tmp_path: Path, seeded: int) -> None:
    net, callback = NormNet(), Asked()
    ends: list[dict[str, Tensor]] = []

    class Keeps(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            ends.append(weights(pl_module))

    fit(tmp_path, net, callback, Keeps(), max_epochs=2, accumulate_grad_batches=2)
    assert callback.asked == [(0, None), (1, None), (None, 0), (2, None), (3, None), (None, 1)]
    torch.testing.assert_close(net.layer.weight, (ends[0]["layer.weight"] + ends[1]["layer.weight"]) / 2)
    assert_same_bits({"mean": net.norm.running_mean}, {"mean": ends[1]["norm.running_mean"]})


def test_the_moving_average_is_updated_when_its_arguments_say() -> None:
    callback = EMAWeightAveraging(update_every_n_steps=3, update_starting_at_step=5, update_starting_at_epoch=2)
    assert [step for step in range(14) if callback.should_update(step_idx=step)] == [6, 9, 12]
    assert [epoch for epoch in range(5) if callback.should_update(epoch_idx=epoch)] == [2, 3, 4]
    assert not EMAWeightAveraging(update_every_n_steps=0).should_update(step_idx=0)
    assert not EMAWeightAveraging().should_update(epoch_idx=100)


def test_a_failure_within_validation_leaves_and_saves_the_weights_that_are_trained(tmp_path: Path, seeded: int) -> None:
    class Fails(NormNet):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1:
                raise ArithmeticError("in validation")
            return super().validation_step(batch, batch_idx)

    net = Fails()
    trained = twin(net)
    expected, _ = by_hand(trained, 2)
    saving = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, every_n_epochs=100)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, net, WeightAveraging(), saving)
    assert_same_bits(weights(net), weights(trained))
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert_same_bits(saved["state_dict"], weights(expected.module))
    assert_same_bits(saved["current_model_state"], weights(trained))


def test_after_the_fit_another_module_is_validated_as_it_is(tmp_path: Path, seeded: int) -> None:
    net, other = NormNet(), NormNet()
    trainer = fit(tmp_path, net, WeightAveraging())
    before = weights(other)
    trainer.validate(other, regression_loader(2, 4), verbose=False)
    assert_same_bits(other.validated[0], before)
    assert_same_bits(weights(other), before)


def test_a_checkpoint_without_an_average_begins_one(tmp_path: Path, seeded: int) -> None:
    fit(tmp_path, NormNet(), SavesAfter(tmp_path / "plain.ckpt", 0), max_epochs=1)
    net, callback = NormNet(), WeightAveraging()
    fit(tmp_path, net, callback, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.state_dict() == {"latest_update_step": 6}
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(net.layer.weight, saved["layer.weight"])


class Leaves(Callback):
    """Leaves what each rank validated in files."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(weights(pl_module), f"epoch{trainer.current_epoch}-rank{trainer.global_rank}.pt")


def test_on_two_ranks_both_validate_one_average(tmp_path: Path, seeded: int) -> None:
    net = NormNet()
    trainer = fit(tmp_path, net, Leaves(), WeightAveraging(), devices=2, max_epochs=2)
    trainer.close()
    for epoch in (0, 1):
        one, other = (torch.load(f"epoch{epoch}-rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same_bits(one, other)
    assert_same_bits(weights(net), one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightAveraging(decay=0.9), "was given decay; .* one of avg_fn and multi_avg_fn"),
        (lambda: WeightAveraging(avg_fn=max, multi_avg_fn=max), "was given avg_fn, multi_avg_fn; .* one of"),
        (lambda: EMAWeightAveraging(avg_fn=max), "decided on by decay; use WeightAveraging"),
        (lambda: EMAWeightAveraging(decay=1.5), r"decay=1.5\); give .* from 0.0 to 1.0"),
        (lambda: EMAWeightAveraging(update_every_n_steps=-1), r"update_every_n_steps=-1\); give an int >= 0"),
    ],
)
def test_wrong_arguments_are_refused_with_the_right_ones(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_an_override_that_leaves_the_average_out_is_told(tmp_path: Path) -> None:
    class Forgets(WeightAveraging):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pass

    with pytest.raises(MisconfigurationException, match=r"super\(\).on_fit_start"):
        fit(tmp_path, NormNet(), Forgets())
