"""Communication hooks of PyTorch's on CPU ranks: sent to helpers, begun anew, kept in checkpoints; and local SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digits_with_hooks import accuracy, hooks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.utils.data import DataLoader, TensorDataset

import lightlite as pl
from lightlite.callbacks import Callback, ModelCheckpoint
from lightlite.errors import MisconfigurationException
from lightlite.plugins.ddp import DDPStrategy

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* has a validation_step, but there is no val loader", "ignore:.*holds the state of callbacks that"
)


class Module(pl.LightningModule):
    """Notes, after each batch, how far apart the ranks' models are, and what is evaluated."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Dropout(0.1), nn.Linear(24, 1))
        self.folder = folder
        self.apart: list[float] = []
        self.evaluated: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]).squeeze(1) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluated.append(self._distance())

    def _distance(self) -> float:
        flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters()])
        every = self.all_gather(flat)
        return float((every - every[0]).abs().max())

    def on_train_batch_end(self, *_: Any) -> None:
        self.apart.append(self._distance())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7), "interval": "step"}]


def data(samples: int = 96) -> TensorDataset:
    x = torch.randn(samples, 24, generator=torch.Generator().manual_seed(4))
    return TensorDataset(x, x[:, :3].sum(1))


def trainer_of(folder: Path, strategy: DDPStrategy, ranks: int = 2, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
    }
    where = {"accelerator": "cpu", "devices": ranks, "strategy": strategy, "default_root_dir": folder}
    return pl.Trainer(**{**where, **quiet, **settings})


def power_sgd() -> DDPStrategy:
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5)
    return DDPStrategy(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook)


def local_sgd(period: int = 3, start: int = 2) -> DDPStrategy:
    state = PostLocalSGDState(None, None, start_localSGD_iter=start, post_local_gradient_allreduce=False)
    return DDPStrategy(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=period)


def fitted(folder: Path, strategy: DDPStrategy, ckpt_path: Path | None = None, **settings: Any) -> Module:
    module = Module()
    torch.manual_seed(7)
    loader = DataLoader(data(), batch_size=8, shuffle=True)
    trainer_of(folder, strategy, **settings).fit(module, loader, ckpt_path=ckpt_path)
    return module


def difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def test_hooks_compress_on_cpu_ranks_and_keep_them_equal(tmp_path: Path) -> None:
    exact = fitted(tmp_path, DDPStrategy())
    wrapped = DDPStrategy(
        ddp_comm_state=PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5),
        ddp_comm_hook=powerSGD_hook,
        ddp_comm_wrapper=fp16_compress_wrapper,
    )
    hooks = {
        "fp16": DDPStrategy(ddp_comm_hook=fp16_compress_hook),
        "bf16": DDPStrategy(ddp_comm_hook=bf16_compress_hook),
        "power": power_sgd(),
        "wrapped": wrapped,
    }
    apart = {}
    for name, strategy in hooks.items():
        module = fitted(tmp_path, strategy)
        assert max(module.apart) == 0
        apart[name] = difference(module, exact)
    assert all(distance > 0 for distance in apart.values())
    assert max(apart["fp16"], apart["bf16"]) < 0.05


def test_a_state_is_begun_anew_with_each_fit_and_can_be_read_afterwards(tmp_path: Path) -> None:
    state = PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
    strategy = DDPStrategy(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook)
    loader = DataLoader(data(), batch_size=8)
    modules = [Module(), Module()]
    for module in modules:
        torch.manual_seed(0)
        trainer_of(tmp_path, strategy, max_epochs=1).fit(module, loader)
        assert state.iter == 6
        assert state.compression_stats()[0] > 1
    assert difference(*modules) == 0


@pytest.mark.parametrize(("make", "ranks", "step"), [(power_sgd, 2, 5), (local_sgd, 2, 7), (local_sgd, 2, 8)])
def test_a_resumed_run_ends_bit_for_bit_like_the_whole(tmp_path: Path, make: Any, ranks: int, step: int) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fitted(tmp_path, make(), ranks=ranks, callbacks=[keeper], enable_checkpointing=True)
    resumed = fitted(tmp_path, make(), tmp_path / f"step={step}.ckpt", ranks=ranks)
    assert difference(whole, resumed) == 0
    assert resumed.apart == whole.apart[step:]


class SavesAtStart(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_what_is_saved_as_a_resumed_run_begins_is_what_it_was_resumed_from(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7)
    whole = fitted(tmp_path, local_sgd(), callbacks=[keeper], enable_checkpointing=True)
    again = tmp_path / "again.ckpt"
    fitted(tmp_path, local_sgd(), tmp_path / "step=7.ckpt", callbacks=[SavesAtStart(again)], max_steps=8)
    assert difference(whole, fitted(tmp_path, local_sgd(), again)) == 0


def test_three_ranks_add_gradients_up_in_the_same_order_from_the_first_step_of_a_resumed_run(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fitted(tmp_path, DDPStrategy(), ranks=3, callbacks=[keeper], enable_checkpointing=True)
    resumed = fitted(tmp_path, DDPStrategy(), tmp_path / "step=5.ckpt", ranks=3)
    assert difference(whole, resumed) == 0


def test_models_are_apart_between_averagings_and_the_average_is_evaluated_and_saved(tmp_path: Path) -> None:
    module, strategy = Module(), local_sgd(period=3, start=2)
    settings = {"max_epochs": 1, "val_check_interval": 1}
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = trainer_of(tmp_path, strategy, callbacks=[keeper], enable_checkpointing=True, **settings)
    trainer.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(8), batch_size=4))
    assert [distance > 0 for distance in module.apart] == [False, False, False, True, True, False]
    assert module.evaluated == [0.0] * len(module.evaluated) != []
    assert type(trainer.optimizers[0]) is torch.optim.Adam
    kept = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    own = [states["averager"]["own"] for states in kept["lightlite"]["strategy"]]
    for values, mean in zip(zip(*own, strict=True), kept["state_dict"].values(), strict=True):
        assert not torch.equal(*values)
        torch.testing.assert_close(sum(values) / 2, mean)


class ThawsLater(Module):
    """All its parameters are frozen until the second epoch."""

    def setup(self, stage: str) -> None:
        self.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.current_epoch else torch.zeros(1, requires_grad=True)

    def on_train_epoch_start(self) -> None:
        self.requires_grad_(self.current_epoch == 1)


def test_models_are_averaged_that_are_trained_only_later(tmp_path: Path) -> None:
    module = ThawsLater()
    trainer_of(tmp_path, local_sgd(period=3, start=2)).fit(module, DataLoader(data(), batch_size=8))
    assert [distance > 0 for distance in module.apart] == [False] * 6 + [False, False, False, True, True, False]


@pytest.mark.filterwarnings("ignore:.*was taken within an epoch of 6 batches")
def test_other_numbers_of_ranks_begin_a_state_anew_with_a_warning(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fitted(tmp_path, power_sgd(), callbacks=[keeper], enable_checkpointing=True, max_epochs=1)
    with pytest.warns(UserWarning, match=r"is of 2 ranks, and there are 1: what DDPStrategy kept"):
        fitted(tmp_path, power_sgd(), tmp_path / "step=5.ckpt", ranks=1)


def test_the_digits_are_learned_with_compressed_gradients() -> None:
    assert accuracy(hooks()["PowerSGD within fp16"], epochs=2, devices=2) > 0.6


def test_local_sgd_wants_its_state_and_its_period() -> None:
    with pytest.raises(MisconfigurationException, match="for local SGD give both"):
        DDPStrategy(model_averaging_period=4)
    with pytest.raises(MisconfigurationException, match="for local SGD give both"):
        DDPStrategy(ddp_comm_state=PostLocalSGDState(None, None, 2), ddp_comm_hook=post_localSGD_hook)
    with pytest.raises(MisconfigurationException, match="model_averaging_period=0"):
        DDPStrategy(model_averaging_period=0)
