from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import FEATURES, TRAINING_ALONE, Net, assert_same_bits, quiet_trainer, regression_loader, weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from lightlite.callbacks import Callback, StochasticWeightAveraging
from lightlite.errors import MisconfigurationException

from .programs import SavesAfter

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)
START, EPOCHS, RATE = 2, 5, 0.02


class SwaNet(Net):
    """Momentum and a scheduler; batch normalization if wanted."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]


class Rates(Callback):
    """Keeps the learning rate, the weights and the scheduler's class at each epoch's start."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.schedulers: list[str] = []
        self.starts: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.schedulers.append(type(trainer.lr_scheduler_configs[0].scheduler).__name__)
        self.starts.append(weights(pl_module))


def loader() -> Any:
    return regression_loader(3, 4)


def by_hand(net: SwaNet, strategy: str = "cos", epochs: int = EPOCHS) -> tuple[AveragedModel, list[float]]:
    """The same as a loop: the average of the weights that the epochs from `START` on begin with, and all rates."""
    average = AveragedModel(net)
    (optimizer,), (scheduler,) = net.configure_optimizers()
    rates = []
    for epoch in range(epochs):
        if epoch == START - 1:
            scheduler = SWALR(optimizer, RATE, 2, strategy)  # type: ignore[arg-type]
        rates.append(optimizer.param_groups[0]["lr"])
        if epoch >= START - 1:
            average.update_parameters(net)
        for batch in loader():
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()
        scheduler.step()
    update_bn(loader(), average)
    return average, rates


def swa(**options: Any) -> StochasticWeightAveraging:
    return StochasticWeightAveraging(**{"swa_lrs": RATE, "swa_epoch_start": START, "annealing_epochs": 2, **options})


def twin(net: SwaNet, norm: bool = False) -> SwaNet:
    other = SwaNet(norm)
    other.load_state_dict(net.state_dict())
    return other


def fit(folder: Path, net: Net, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Any:
    trainer = quiet_trainer(folder, **{"callbacks": list(callbacks), "max_epochs": EPOCHS, **settings})
    trainer.fit(net, loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_the_average_is_torchs_of_a_hand_written_loop(tmp_path: Path, seeded: int, strategy: str) -> None:
    net, rates = SwaNet(), Rates()
    expected, expected_rates = by_hand(twin(net), strategy)
    fit(tmp_path, net, swa(annealing_strategy=strategy), rates)
    torch.testing.assert_close(weights(net), weights(expected.module), rtol=1e-6, atol=0)
    assert rates.values == expected_rates
    assert rates.schedulers == ["StepLR", "SWALR", "SWALR", "SWALR", "SWALR"]


def test_an_epoch_that_trains_nothing_renews_the_statistics_of_the_average(tmp_path: Path, seeded: int) -> None:
    net, rates = SwaNet(norm=True), Rates()
    expected, _ = by_hand(twin(net, norm=True))
    trainer = fit(tmp_path, net, swa(), rates)
    actual = weights(net)
    torch.testing.assert_close(actual, weights(expected.module), rtol=1e-6, atol=1e-8)
    assert actual["norm.num_batches_tracked"] == 3
    assert net.norm.momentum == 0.1
    assert len(rates.starts) == EPOCHS + 1
    assert trainer.current_epoch == EPOCHS + 1
    assert trainer.max_epochs == EPOCHS


def test_all_hooks_but_those_of_training_run_in_that_epoch(tmp_path: Path, seeded: int) -> None:
    calls: list[str] = []

    class Notes(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            calls.append(f"{trainer.current_epoch} batch {outputs['loss'].requires_grad} {trainer.global_step}")

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            calls.append(f"{trainer.current_epoch} backward")

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            calls.append(f"{trainer.current_epoch} step")

    fit(tmp_path, SwaNet(norm=True), swa(), Notes(), max_epochs=2)
    assert calls[-5:] == ["1 step", "1 batch False 6", "2 batch False 6", "2 batch False 6", "2 batch False 7"]


class Stops(Callback):
    """Asks to stop after an epoch."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.after:
            trainer.should_stop = True


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"callbacks": [swa(), Stops(2)]},
        {"callbacks": [swa()], "max_steps": 9},
        {"callbacks": [swa(), Stops(2)], "max_epochs": -1},
    ],
    ids=["stop", "steps", "endless"],
)
def test_a_fit_that_ends_early_ends_with_the_average(
    tmp_path: Path, seeded: int, settings: dict[str, Any], norm: bool
) -> None:
    net = SwaNet(norm)
    expected, _ = by_hand(twin(net, norm), epochs=3)
    trainer = fit(tmp_path, net, **settings)
    torch.testing.assert_close(weights(net), weights(expected.module), rtol=1e-6, atol=1e-8)
    assert trainer.current_epoch == 3 + norm


def test_a_fit_that_ends_before_the_start_keeps_what_it_trained(tmp_path: Path, seeded: int) -> None:
    net, plain = SwaNet(norm=True), SwaNet(norm=True)
    plain.load_state_dict(net.state_dict())
    fit(tmp_path, plain, max_epochs=2)
    with pytest.warns(UserWarning, match=r"swa_epoch_start=7\) begins after max_epochs=2"):
        trainer = fit(tmp_path, net, swa(swa_epoch_start=7), max_epochs=2)
    assert_same_bits(weights(net), weights(plain))
    assert trainer.global_step == 6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("moment", [(0, None), (1, 1), (2, None), (3, 2), (4, None), (5, 0), (5, 2), (5, None)])
def test_a_resumed_fit_ends_as_if_it_had_not_been_interrupted(
    tmp_path: Path, seeded: int, moment: Any, norm: bool
) -> None:
    if moment[0] == EPOCHS and not norm:
        return  # there is no such epoch
    whole, resumed, path = SwaNet(norm), SwaNet(norm), tmp_path / "saved.ckpt"
    fit(tmp_path, whole, swa(), SavesAfter(path, *moment))
    trainer = fit(tmp_path, resumed, swa(), ckpt_path=path)
    assert_same_bits(weights(resumed), weights(whole))
    assert trainer.current_epoch == EPOCHS + norm
    assert not norm or resumed.norm.momentum == 0.1


def test_the_state_has_lightnings_keys(tmp_path: Path, seeded: int) -> None:
    path = tmp_path / "saved.ckpt"
    fit(tmp_path, SwaNet(), swa(), SavesAfter(path, 2))
    state = torch.load(path, weights_only=True)["callbacks"]["StochasticWeightAveraging"]
    assert set(state) == {"n_averaged", "latest_update_epoch", "scheduler_state", "average_model_state"}
    assert (state["n_averaged"], state["latest_update_epoch"]) == (2, 2)
    assert state["scheduler_state"]["_step_count"] == 3


def test_a_checkpoint_without_an_average_begins_one_late_and_says_so(tmp_path: Path, seeded: int) -> None:
    path, net = tmp_path / "plain.ckpt", SwaNet()
    fit(tmp_path, SwaNet(), SavesAfter(path, 2))
    callback = swa()
    with pytest.warns(UserWarning, match="begins in epoch 3, though it was to in epoch 1"):
        fit(tmp_path, net, callback, ckpt_path=path)
    assert int(callback.n_averaged) == 2


def test_the_averaging_function_and_the_start_as_a_share_are_the_users(tmp_path: Path, seeded: int) -> None:
    net, rates = SwaNet(), Rates()
    fit(tmp_path, net, swa(swa_epoch_start=0.8, avg_fn=lambda average, value, count: value), rates)
    assert rates.schedulers == ["StepLR", "StepLR", "StepLR", "SWALR", "SWALR"]
    assert_same_bits(weights(net), rates.starts[-1])


def test_a_further_fit_averages_anew(tmp_path: Path, seeded: int) -> None:
    callback = swa()
    trainer = fit(tmp_path, net := SwaNet(), callback, max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="begins in epoch 2, though it was to in epoch 1"):
        trainer.fit(net, loader())
    assert int(callback.n_averaged) == 2


def test_on_two_ranks_statistics_are_of_all_batches(tmp_path: Path, seeded: int) -> None:
    two, one = SwaNet(norm=True), SwaNet(norm=True)
    two.load_state_dict(one.state_dict())
    for net, devices in ((one, 1), (two, 2)):
        net.lr = 0.0
        net.configure_optimizers = lambda net=net: torch.optim.SGD(net.parameters(), lr=1e-9)  # type: ignore[method-assign]
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[swa(swa_lrs=1e-9)], devices=devices)
        trainer.fit(net, regression_loader(4, 4))
        trainer.close()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(two.norm, name), getattr(one.norm, name), rtol=1e-5, atol=1e-6)
    assert not torch.equal(two.norm.running_mean, torch.zeros(FEATURES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swa_lrs": 0.0}, r"swa_lrs=0.0\); give a float above 0.0"),
        ({"swa_lrs": 1}, r"swa_lrs=1\); give a float above"),
        ({"swa_lrs": [0.1, -0.1]}, r"swa_lrs=\[0.1, -0.1\]\); .* one for each parameter group"),
        ({"swa_epoch_start": 0}, r"swa_epoch_start=0\); give an int >= 1, or a float from 0.0 to 1.0"),
        ({"swa_epoch_start": 1.5}, r"swa_epoch_start=1.5\); give an int >= 1"),
        ({"annealing_epochs": -1}, r"annealing_epochs=-1\); give an int >= 0"),
        ({"annealing_strategy": "exp"}, r"annealing_strategy='exp'\); give 'cos' or 'linear'"),
        ({"avg_fn": "mean"}, r"avg_fn='mean'\); give a function of"),
        ({"device": 0}, r"device=0\); give a torch.device"),
    ],
)
def test_wrong_arguments_are_refused_with_the_right_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        swa(**options)


def test_what_it_cannot_average_is_refused(tmp_path: Path) -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    two, by_hand = Two(), SwaNet(norm=True)
    two.automatic_optimization = by_hand.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"one optimizer .* Two.configure_optimizers returned 2 and 0"):
        fit(tmp_path, two, swa())
    with pytest.raises(MisconfigurationException, match="batch normalization in manual optimization"):
        fit(tmp_path, by_hand, swa())
    with pytest.raises(MisconfigurationException, match=r"swa_epoch_start=0.5\) is a share of max_epochs"):
        fit(tmp_path, SwaNet(), swa(swa_epoch_start=0.5), max_epochs=-1)
    with pytest.raises(MisconfigurationException, match=r"has 2 learning rates, but the optimizer has 1 parameter gr"):
        fit(tmp_path, SwaNet(), swa(swa_lrs=[0.1, 0.2]))
