from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TRAINING_ALONE, CountingNet, Net, assert_same_bits, quiet_trainer, regression_loader, weights

from lightlite.callbacks import Callback, Checkpoint, OnExceptionCheckpoint
from lightlite.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


class Fails(Callback):
    """Raises before a batch, on one rank."""

    def __init__(self, epoch: int, batch_idx: int, error: type[BaseException] = ArithmeticError, rank: int = 0) -> None:
        self.when, self.error, self.rank = (epoch, batch_idx), error, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.when and trainer.global_rank == self.rank:
            raise self.error("on purpose")


def fit(net: Net, *callbacks: Callback, ckpt_path: str | None = None, **settings: Any) -> Any:
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    options = {"callbacks": list(callbacks), "max_epochs": 3, "enable_checkpointing": saves, **settings}
    trainer = quiet_trainer(Path.cwd(), **options)
    trainer.fit(net, regression_loader(4, shuffle=True), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_fit_goes_on_from_where_it_failed(seeded: int, error: Any) -> None:
    whole, failed, resumed = CountingNet(), CountingNet(), CountingNet()
    failed.load_state_dict(whole.state_dict())
    random_state = torch.get_rng_state()
    fit(whole)
    torch.set_rng_state(random_state)
    saving = OnExceptionCheckpoint("saved")
    with pytest.raises(error):
        fit(failed, saving, Fails(1, 2, error))
    assert saving.ckpt_path == "saved/on_exception.ckpt"
    assert torch.load("saved/on_exception.ckpt", weights_only=True)["global_step"] == 6
    fit(resumed, OnExceptionCheckpoint("saved"), ckpt_path="saved/on_exception.ckpt")
    assert resumed.trained == [(1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert_same_bits(weights(resumed), weights(whole))
    assert not Path("saved/on_exception.ckpt").exists()


def test_only_a_fit_that_ends_well_removes_the_file() -> None:
    with pytest.raises(ArithmeticError):
        fit(Net(), OnExceptionCheckpoint(Path("saved"), "left"), Fails(0, 1))
    callback = OnExceptionCheckpoint("saved", "left")
    trainer = quiet_trainer(Path.cwd(), callbacks=[callback], enable_checkpointing=True)
    trainer.validate(Net(), regression_loader(), ckpt_path="saved/left.ckpt", verbose=False)
    assert Path("saved/left.ckpt").exists()


def test_a_failure_before_training_leaves_an_earlier_file_alone() -> None:
    with pytest.raises(ArithmeticError):
        fit(Net(), OnExceptionCheckpoint("saved"), Fails(1, 1))
    before = Path("saved/on_exception.ckpt").read_bytes()

    class Broken(Net):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("no optimizer")

    with pytest.raises(RuntimeError, match="no optimizer"):
        fit(Broken(), OnExceptionCheckpoint("saved"), ckpt_path="saved/on_exception.ckpt")
    assert Path("saved/on_exception.ckpt").read_bytes() == before


@pytest.mark.parametrize("rank", [0, 1])
def test_with_two_ranks_a_failure_of_either_is_saved(rank: int) -> None:
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(Net(), OnExceptionCheckpoint("saved"), Fails(1, 1, rank=rank), devices=2)
    saved = torch.load("saved/on_exception.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 3)
    resumed = CountingNet()
    trainer = fit(resumed, OnExceptionCheckpoint("saved"), ckpt_path="saved/on_exception.ckpt", devices=2)
    trainer.close()
    assert resumed.trained == [(1, 1), (2, 0), (2, 1)]


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"filename=''\); give a name"):
        OnExceptionCheckpoint(".", "")
