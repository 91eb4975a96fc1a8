"""What reviewers and testers found once, held so that it does not come back."""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightlite as pl
from lightlite import storage
from lightlite.callbacks import Callback
from lightlite.errors import CheckpointError, MisconfigurationException

from .models import TRAINING_ALONE, CountingNet, Net, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Color(str, Enum):
    RED = "red"


def test_numbers_of_numpy_enumerations_and_paths_are_kept_as_plain_data(tmp_path: Path) -> None:
    odd = {"lr": np.float64(0.1), "n": np.int32(3), "color": Color.RED, "path": Path("a"), "d": defaultdict(int, a=1)}
    storage.write({"odd": odd}, tmp_path / "x.ckpt")
    kept = storage.read(tmp_path / "x.ckpt")["odd"]
    assert kept == {"lr": 0.1, "n": 3, "color": "red", "path": "a", "d": {"a": 1}}
    assert {type(value) for value in kept.values()} == {float, int, str, dict}


def test_an_object_in_a_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\['a'\]\[1\] is .*object"):
        storage.write({"a": [0, object()]}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_hyper_parameters_that_cannot_be_kept_are_left_out_and_named(tmp_path: Path) -> None:
    class Odd(Net):
        def __init__(self, act: Any = nn.ReLU, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = quiet_trainer(tmp_path)
    trainer.fit(Odd(), regression_loader(2))
    with pytest.warns(UserWarning, match="the hyper-parameters act of Odd"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert storage.read(tmp_path / "x.ckpt")["hyper_parameters"] == {"width": 4}
    assert Odd.load_from_checkpoint(tmp_path / "x.ckpt").hparams.width == 4


def test_a_checkpoint_after_an_error_in_the_step_holds_no_gradients(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ArithmeticError("once")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path)
    with pytest.raises(ArithmeticError):
        trainer.fit(Fails(), regression_loader(4))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert storage.read(tmp_path / "x.ckpt")["lightlite"]["window"] == [{}]


def test_a_fit_after_a_failed_one_begins_the_epoch_anew(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ArithmeticError("once")
            return super().training_step(batch, batch_idx)

    seen: list[int] = []

    class Counts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path)
    with pytest.raises(ArithmeticError):
        trainer.fit(Fails(), regression_loader(4))
    trainer.fit(Counts(), regression_loader(4))
    assert seen == [0, 1, 2, 3]


def test_algorithms_are_set_on_every_rank(tmp_path: Path) -> None:
    class Look(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.are_deterministic_algorithms_enabled()

    try:
        trainer = quiet_trainer(tmp_path, devices=2, accelerator="cpu", deterministic=True)
        assert trainer.predict(Look(), regression_loader(4)) == [True] * 4
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_stream_shorter_than_the_limit_is_validated_at_its_end(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from regression_loader(3).dataset

    seen: list[int] = []

    class Validated(CountingNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.trainer.global_step)

    trainer = quiet_trainer(tmp_path, limit_train_batches=100)
    trainer.fit(Validated(), DataLoader(Stream(), batch_size=1), regression_loader(1))
    assert len(seen) == 1
    assert seen[0] == trainer.global_step > 0


def test_a_batch_size_of_zero_weighs_nothing(tmp_path: Path) -> None:
    class Weighted(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx), batch_size=batch_idx)

    assert quiet_trainer(tmp_path).validate(Weighted(), regression_loader(2), verbose=False) == [{"val": 1.0}]


def test_none_among_the_callbacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"callbacks.*None"):
        pl.Trainer(callbacks=[None], default_root_dir=tmp_path)  # type: ignore[list-item]


def test_validating_every_zero_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="val_check_interval=0"):
        quiet_trainer(tmp_path, val_check_interval=0)


def test_all_are_told_of_an_error_though_one_of_them_raises(tmp_path: Path) -> None:
    told: list[str] = []

    class Raises(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            raise KeyError("further")

    class Listens(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            told.append(type(exception).__name__)

    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ArithmeticError("first")

    with pytest.raises(ArithmeticError, match="first"):
        quiet_trainer(tmp_path, callbacks=[Raises(), Listens()]).fit(Fails(), regression_loader(2))
    assert told == ["ArithmeticError"]
