"""A program for Lightning 1.x is told, of each thing that is gone, what to write now."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import lightlite as pl
from lightlite.errors import MisconfigurationException
from lightlite.formerly import ARGUMENTS, NOT_CALLED

from .models import TRAINING_ALONE, Net, quiet_trainer, regression_loader

pytestmark = pytest.mark.filterwarnings(TRAINING_ALONE)


@pytest.mark.parametrize(
    ("argument", "value", "instead"),
    [
        ("gpus", 2, "accelerator='gpu', devices=…"),
        ("num_processes", 2, "accelerator='cpu', devices=…"),
        ("auto_lr_find", True, "Tuner(trainer).lr_find(model)"),
        ("auto_scale_batch_size", "power", "Tuner(trainer).scale_batch_size(model)"),
        ("checkpoint_callback", False, "enable_checkpointing=…"),
        ("progress_bar_refresh_rate", 20, "TQDMProgressBar(refresh_rate=…)"),
        ("replace_sampler_ddp", False, "use_distributed_sampler=…"),
        ("resume_from_checkpoint", "last.ckpt", "trainer.fit(model, ckpt_path=…)"),
        ("weights_summary", "top", "ModelSummary(max_depth=…)"),
    ],
)
def test_an_argument_of_1_x_names_its_successor(argument: str, value: Any, instead: str) -> None:
    with pytest.raises(TypeError) as caught:
        pl.Trainer(**{argument: value})
    assert str(caught.value).startswith(f"Trainer({argument}={value!r}): there is no argument {argument!r}, which ")
    assert instead in str(caught.value)


def test_no_argument_that_there_is_counts_as_one_of_1_x() -> None:
    assert not ARGUMENTS.keys() & inspect.signature(pl.Trainer).parameters.keys()


def test_an_argument_that_is_misspelled_is_guessed_and_all_are_listed() -> None:
    with pytest.raises(TypeError, match=r"Trainer\(max_epoch=3\).*did you mean max_epochs") as caught:
        pl.Trainer(max_epoch=3)
    assert all(name in str(caught.value) for name in ("accelerator", "profiler", "timeout"))
    with pytest.raises(TypeError, match=r"no argument 'zzz'; There are: accelerator"):
        pl.Trainer(zzz=1)


def test_arguments_without_names_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Trainer\('gpu', 2\): give arguments by name"):
        pl.Trainer("gpu", 2)


@pytest.mark.parametrize(
    ("entry_point", "hook", "instead"),
    [
        ("fit", "training_epoch_end", "on_train_epoch_end"),
        ("fit", "validation_epoch_end", "on_validation_epoch_end"),
        ("validate", "validation_epoch_end", "on_validation_epoch_end"),
        ("test", "test_epoch_end", "on_test_epoch_end"),
    ],
)
def test_a_hook_that_lightning_2_refuses_is_refused(tmp_path: Path, entry_point: str, hook: str, instead: str) -> None:
    module = type("Old", (Net,), {hook: lambda self, outputs: None})()
    with pytest.raises(NotImplementedError, match=rf"Old defines {hook}, .*; define {instead}\(self\) instead"):
        getattr(quiet_trainer(tmp_path), entry_point)(module, regression_loader(1))


def test_such_a_hook_of_another_loop_is_passed_over(tmp_path: Path) -> None:
    module = type("Old", (Net,), {"test_epoch_end": lambda self, outputs: None})()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, regression_loader(1))
    assert trainer.global_step == 1


@pytest.mark.parametrize("hook", NOT_CALLED)
def test_a_hook_that_nobody_calls_any_more_is_warned_of(tmp_path: Path, hook: str) -> None:
    module = type("Old", (Net,), {hook: lambda self, *_: pytest.fail("it was called")})()
    with pytest.warns(UserWarning, match=f"Old defines {hook}, .*nobody calls any more: see ") as caught:
        quiet_trainer(tmp_path).validate(module, regression_loader(1), verbose=False)
    assert NOT_CALLED[hook] in str(caught[0].message)


def test_a_step_that_takes_optimizer_idx_is_told_of_manual_optimization(tmp_path: Path) -> None:
    class Old(Net):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match=r"training_step takes optimizer_idx.*automatic_optimization"):
        quiet_trainer(tmp_path).fit(Old(), regression_loader(1))
