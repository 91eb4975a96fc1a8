"""Checkpoints in the layouts of older Lightning versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightlite.callbacks import ModelCheckpoint

from .models import Net, assert_same_bits, quiet_trainer, regression_loader, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no val loader")


def as_of_1_6(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same as Lightning 1.6.0 wrote it: other names in the loops' state, no count of batches that stepped."""
    fit = checkpoint["loops"]["fit_loop"]
    renamed = {
        "epoch_loop.automatic_optimization.state_dict": "epoch_loop.batch_loop.optimizer_loop.state_dict",
        "epoch_loop.automatic_optimization.optim_progress": "epoch_loop.batch_loop.optimizer_loop.optim_progress",
        "epoch_loop.manual_optimization.state_dict": "epoch_loop.batch_loop.manual_loop.state_dict",
        "epoch_loop.manual_optimization.optim_step_progress": "epoch_loop.batch_loop.manual_loop.optim_step_progress",
    }
    loops = {renamed.get(key, key): value for key, value in fit.items()}
    loops["epoch_loop.state_dict"] = {}
    loops["epoch_loop.batch_loop.state_dict"] = {}
    loops["epoch_loop.val_loop.dataloader_progress"] = {"total": {"ready": 0}, "current": {"ready": 0}}
    callbacks = {
        key.replace(
            ", 'train_time_interval': None", ", 'train_time_interval': None, 'save_on_train_epoch_end': None"
        ): (value)
        for key, value in checkpoint["callbacks"].items()
    }
    assert callbacks.keys() != checkpoint["callbacks"].keys()
    kept = {key: value for key, value in checkpoint.items() if key != "lightlite"}
    return {**kept, "loops": {"fit_loop": loops}, "callbacks": callbacks, "pytorch-lightning_version": "1.6.0"}


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_fit_goes_on_from_a_file_of_lightning_1_6(tmp_path: Path, step: int) -> None:
    def keeper() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    torch.manual_seed(0)
    whole = Net()
    settings: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 2}
    quiet_trainer(tmp_path, callbacks=[keeper()], **settings).fit(whole, regression_loader(4))
    path = tmp_path / f"step={step}.ckpt"
    torch.save(as_of_1_6(torch.load(path, weights_only=True)), tmp_path / "old.ckpt")

    resumed = Net()
    trainer = quiet_trainer(tmp_path, callbacks=[keeper()], **settings)
    trainer.fit(resumed, regression_loader(4), ckpt_path=tmp_path / "old.ckpt")
    assert trainer.global_step == 8
    assert trainer.current_epoch == 2
    assert_same_bits(weights(resumed), weights(whole))


@pytest.mark.parametrize("former", ["MixedPrecisionPlugin", "NativeMixedPrecisionPlugin", "native_amp_scaling_state"])
def test_the_scaler_is_found_under_its_former_names(tmp_path: Path, former: str) -> None:
    path = tmp_path / "new.ckpt"
    trainer = quiet_trainer(tmp_path, precision="16-mixed")
    trainer.fit(Net(), regression_loader(2))
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    state = {"scale": 77.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 5}
    checkpoint.pop("MixedPrecision", None)
    torch.save({**checkpoint, former: state}, path)
    trainer = quiet_trainer(tmp_path, precision="16-mixed", max_epochs=2)
    trainer.fit(Net(), regression_loader(1), ckpt_path=path)
    assert trainer.scaler is not None
    assert trainer.scaler.get_scale() == 77.0
