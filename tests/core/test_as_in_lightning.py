"""Small things that programs for Lightning rely on, each of which was found by running one under both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightlite as pl

from .models import TRAINING_ALONE, ManyLoadersNet, Net, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


def test_a_value_logged_by_step_alone_can_be_watched_at_the_epochs_end(tmp_path: Path) -> None:
    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", float(batch_idx))
            return self.loss(batch)

    class Watching(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.callback_metrics["seen"].item())

    seen: list[float] = []
    quiet_trainer(tmp_path, log_every_n_steps=50, callbacks=Watching()).fit(Logging(), regression_loader(3))

    assert seen == [2.0]


def test_an_epochs_mean_holds_every_batch_where_optimizer_step_is_overridden(tmp_path: Path) -> None:
    class Accumulating(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("index", float(batch_idx), on_step=False, on_epoch=True)
            return self.loss(batch)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=2)
    trainer.fit(Accumulating(), regression_loader(4))

    assert trainer.callback_metrics["index"].item() == 1.5


def test_a_callback_may_add_to_what_others_watch(tmp_path: Path) -> None:
    class Adding(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.callback_metrics["added"] = torch.tensor(3.0)

    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="added", filename="{added}")
    quiet_trainer(tmp_path, callbacks=[Adding(), checkpoint], enable_checkpointing=True).fit(Net(), regression_loader())

    assert checkpoint.best_model_path.endswith("added=3.0.ckpt")


def test_barebones_logs_nothing_and_says_so(tmp_path: Path) -> None:
    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return self.loss(batch)

    trainer = pl.Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=1, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"self\.log\('loss', …\) does nothing: the Trainer has barebones=True"):
        trainer.fit(Logging(), regression_loader())

    assert trainer.callback_metrics == {}


def test_before_a_batch_only_the_modules_answer_ends_the_epoch(tmp_path: Path) -> None:
    class Answering(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> int:
            return -1

    trainer = quiet_trainer(tmp_path, callbacks=Answering())
    trainer.fit(Net(), regression_loader(4))

    assert trainer.global_step == 4


def test_evaluating_a_checkpoint_gives_callbacks_their_state_back(tmp_path: Path) -> None:
    class Counting(pl.Callback):
        count = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    counting = Counting()
    trainer = quiet_trainer(tmp_path, callbacks=[counting, saving], enable_checkpointing=True, max_epochs=2)
    trainer.fit(Net(), regression_loader(3))
    trainer.test(Net(), regression_loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)

    assert counting.count == 3
    assert saving.best_model_path == str(tmp_path / "epoch=1.ckpt")


def test_what_is_not_for_the_loggers_is_not_returned_either(tmp_path: Path) -> None:
    class Logging(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("shown", 1.0)
            self.log("watched", 2.0, logger=False)

    trainer = quiet_trainer(tmp_path)

    assert trainer.validate(Logging(), regression_loader(), verbose=False) == [{"shown": 1.0}]
    assert trainer.callback_metrics["watched"] == 2.0


def test_what_was_saved_at_a_validations_end_is_not_validated_again(tmp_path: Path) -> None:
    class Counting(Net):
        validations = 0

        def on_validation_start(self) -> None:
            self.validations += 1

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    def fit(**options: Any) -> Counting:
        module = Counting()
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1, filename="{epoch}")
        trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=checkpoint, enable_checkpointing=True)
        trainer.fit(module, regression_loader(), regression_loader(), **options)
        return module

    assert fit().validations == 3
    assert fit(ckpt_path=tmp_path / "epoch=0.ckpt").validations == 2


def test_the_last_batch_is_known_as_such_before_it_is_trained_on(tmp_path: Path) -> None:
    class Noting(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            last.append(self.trainer.is_last_batch)

    last: list[bool] = []
    quiet_trainer(tmp_path).fit(Noting(), regression_loader(3))

    assert last == [False, False, True]


def test_without_a_batch_an_evaluation_calls_no_hook_and_returns_nothing(tmp_path: Path) -> None:
    class Noting(Net):
        def on_test_start(self) -> None:
            raise AssertionError

        on_predict_start = on_test_start

    trainer = quiet_trainer(tmp_path, limit_test_batches=0, limit_predict_batches=0)

    assert trainer.test(Noting(), regression_loader()) == []
    assert trainer.predict(Noting(), regression_loader()) is None
    assert (trainer.num_test_batches, trainer.num_predict_batches) == ([], [])


def test_the_loaders_of_an_evaluation_are_there_afterwards(tmp_path: Path) -> None:
    train, val, test = regression_loader(), regression_loader(), [regression_loader(), regression_loader()]
    trainer = quiet_trainer(tmp_path)
    assert trainer.val_dataloaders is None

    trainer.fit(Net(), train, val)
    trainer.test(ManyLoadersNet(), test, verbose=False)

    assert (trainer.val_dataloaders, trainer.test_dataloaders, trainer.predict_dataloaders) == (val, test, None)


def test_what_training_logged_last_can_be_watched_at_the_end_of_a_validation(tmp_path: Path) -> None:
    class Logging(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("seen", float(batch_idx))

    class Watching(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.callback_metrics["seen"].item())

    seen: list[float] = []
    trainer = quiet_trainer(tmp_path, log_every_n_steps=50, val_check_interval=1, callbacks=Watching())
    trainer.fit(Logging(), regression_loader(3), regression_loader(1))

    assert seen == [0.0, 1.0, 2.0]


def test_a_second_fit_checks_its_sanity_but_a_resumed_one_does_not(tmp_path: Path) -> None:
    class Counting(pl.Callback):
        checks = 0

        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            self.checks += 1

    counting = Counting()
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=1, callbacks=counting)
    model = Net()
    trainer.fit(model, regression_loader(2), regression_loader(1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, regression_loader(2), regression_loader(1))
    assert counting.checks == 2

    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, regression_loader(2), regression_loader(1), ckpt_path=tmp_path / "one.ckpt")
    assert counting.checks == 2


def test_hooks_are_given_an_empty_dict_for_a_batch_that_was_passed_over(tmp_path: Path) -> None:
    class PassingOver(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else self.loss(batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            given.append(list(outputs))

    given: list[list[str]] = []
    quiet_trainer(tmp_path).fit(PassingOver(), regression_loader(3))

    assert given == [["loss"], [], ["loss"]]


def test_the_last_step_before_a_stop_is_logged(tmp_path: Path) -> None:
    class Stopping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("index", float(batch_idx))
            self.trainer.should_stop = batch_idx == 1
            return self.loss(batch)

    trainer = quiet_trainer(tmp_path, log_every_n_steps=3, logger=pl.loggers.CSVLogger(tmp_path, name="", version=""))
    trainer.fit(Stopping(), regression_loader(4))

    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].split(",") == ["0", "1.0", "1"]


def test_an_epoch_that_is_cut_short_counts_for_schedulers_and_validation(tmp_path: Path) -> None:
    class Skipping(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 1.0)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def on_validation_end(self) -> None:
            validated.append(self.trainer.current_epoch)

    validated: list[int] = []
    trainer = quiet_trainer(tmp_path, max_epochs=4, val_check_interval=3, check_val_every_n_epoch=None)
    trainer.fit(Skipping(), regression_loader(4), regression_loader(1))

    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**4
    assert validated == [1]  # after batches 0 and, cut short, 1 of the first epoch, and batch 0 of the second


def test_with_min_steps_an_epoch_is_finished_before_stopping(tmp_path: Path) -> None:
    class Stopping(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = True

    trainer = quiet_trainer(tmp_path, max_epochs=3, min_steps=1)
    trainer.fit(Stopping(), regression_loader(4))

    assert (trainer.min_epochs, trainer.current_epoch, trainer.global_step) == (1, 1, 4)


def test_checkpoints_by_steps_wait_for_a_value_of_a_whole_training_epoch(tmp_path: Path) -> None:
    class Logging(Net):
        def on_train_epoch_end(self) -> None:
            self.log("whole", 1.0)

    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="whole", every_n_train_steps=4)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=checkpoint, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="Nothing is saved until it is there"):
        trainer.fit(Logging(), regression_loader(4), regression_loader(1))
    assert Path(checkpoint.best_model_path).name == "epoch=1-step=8.ckpt"

    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "other", monitor="hole", every_n_train_steps=4)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=checkpoint, enable_checkpointing=True)
    with (
        pytest.warns(UserWarning, match="Nothing is saved until it is there"),
        pytest.raises(pl.errors.MisconfigurationException, match=r"monitor='hole'.*whole"),
    ):
        trainer.fit(Logging(), regression_loader(4), regression_loader(1))
