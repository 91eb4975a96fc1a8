from __future__ import annotations

import logging
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightlite as pl
from lightlite.callbacks import ModelCheckpoint
from lightlite.errors import MisconfigurationException
from lightlite.loggers import CSVLogger

from .programs import Net, Unvalidated, checkpoints, fit, loader, trainer

# Names as PyTorch Lightning 2.6.6 writes them.
NAMES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "default": ({}, {}, {"epoch=2-step=12": 12}),
    "minimum": ({"monitor": "val_loss"}, {}, {"epoch=1-step=8": 8}),
    "maximum": ({"monitor": "val_loss", "mode": "max"}, {}, {"epoch=0-step=4": 4}),
    "best two": (
        {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}-{val_loss:.2f}"},
        {"max_epochs": 6},
        {"epoch=3-val_loss=0.20": 16, "epoch=5-val_loss=0.10": 24},
    ),
    "all": ({"save_top_k": -1}, {}, {"epoch=0-step=4": 4, "epoch=1-step=8": 8, "epoch=2-step=12": 12}),
    "all, monitored": (
        {"save_top_k": -1, "monitor": "val_loss"},
        {},
        {"epoch=0-step=4": 4, "epoch=1-step=8": 8, "epoch=2-step=12": 12},
    ),
    "newest only": ({"save_top_k": 0, "save_last": True}, {}, {"last": 12}),
    "a folder in the name": (
        {"monitor": "val/loss", "filename": "m-{epoch:02d}-{val/loss:.3f}"},
        {},
        {"m-epoch=01-val/loss=0.300": 8},
    ),
    "no metric names": (
        {"monitor": "val/loss", "filename": "m-{epoch:02d}-{val/loss:.3f}", "auto_insert_metric_name": False},
        {},
        {"m-01-0.300": 8},
    ),
    "every 5 steps": ({"every_n_train_steps": 5, "save_top_k": -1}, {}, {"epoch=1-step=5": 5, "epoch=2-step=10": 10}),
    "best of steps": (
        {"every_n_train_steps": 2, "save_top_k": 2, "monitor": "steps", "mode": "max"},
        {},
        {"epoch=2-step=10": 10, "epoch=2-step=12": 12},
    ),
    "every 2 epochs": ({"every_n_epochs": 2, "save_top_k": -1}, {}, {"epoch=1-step=8": 8}),
    "each batch by time": (
        {"train_time_interval": timedelta(0), "save_top_k": -1},
        {"max_epochs": 1},
        {f"epoch=0-step={step}": step for step in (1, 2, 3, 4)},
    ),
    "two validations an epoch": (
        {"save_top_k": -1},
        {"val_check_interval": 0.5, "max_epochs": 2},
        {"epoch=0-step=2": 2, "epoch=0-step=4": 4, "epoch=1-step=6": 6, "epoch=1-step=8": 8},
    ),
    "a validation every two epochs": (
        {"save_top_k": -1},
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        {"epoch=1-step=8": 8, "epoch=3-step=16": 16},
    ),
    "when training ends the epoch": (
        {"save_top_k": -1, "save_on_train_epoch_end": True},
        {"val_check_interval": 0.5, "max_epochs": 2},
        {"epoch=0-step=4": 4, "epoch=1-step=8": 8},
    ),
    "accumulating": (
        {"every_n_train_steps": 1, "save_top_k": -1},
        {"accumulate_grad_batches": 3, "max_epochs": 2},
        {"epoch=0-step=1": 1, "epoch=0-step=2": 2, "epoch=1-step=3": 3, "epoch=1-step=4": 4},
    ),
    "a fixed name": ({"filename": "x"}, {}, {"x": 12}),
}


@pytest.mark.parametrize("case", NAMES)
def test_files_are_named_as_documented(case: str) -> None:
    options, flags, expected = NAMES[case]
    fit(ModelCheckpoint(**options), **flags)
    assert checkpoints("checkpoints") == {f"{name}.ckpt": step for name, step in expected.items()}


def test_files_lie_beside_the_first_loggers(tmp_path: Path) -> None:
    run = fit(ModelCheckpoint(), logger=[CSVLogger("logs", "name"), CSVLogger("other")])
    assert checkpoints() == {"logs/name/version_0/checkpoints/epoch=2-step=12.ckpt": 12}
    assert run.checkpoint_callback.dirpath == "logs/name/version_0/checkpoints"
    fit(ModelCheckpoint(dirpath=tmp_path / "mine", filename="best"), logger=CSVLogger("logs", "name"))
    assert checkpoints("mine") == {"best.ckpt": 12}


def test_what_is_best_is_told() -> None:
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, dirpath="c")
    fit(callback)
    names = {os.path.basename(path): round(float(score), 3) for path, score in callback.best_k_models.items()}
    assert names == {"epoch=1-step=8.ckpt": 0.3, "epoch=2-step=12.ckpt": 0.4}
    assert os.path.basename(callback.best_model_path) == "epoch=1-step=8.ckpt"
    assert os.path.basename(callback.kth_best_model_path) == "epoch=2-step=12.ckpt"
    assert [round(float(v), 3) for v in (callback.best_model_score, callback.kth_value, callback.current_score)] == [
        0.3,
        0.4,
        0.4,
    ]
    callback.to_yaml()
    scores = yaml.safe_load(Path("c/best_k_models.yaml").read_text())
    assert {os.path.basename(path): round(score, 3) for path, score in scores.items()} == names


def test_the_best_checkpoint_is_what_is_tested_and_predicted_with() -> None:
    run = fit(ModelCheckpoint(monitor="val_loss"))
    best = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    run.test(dataloaders=loader(1), verbose=False)
    assert torch.equal(run.lightning_module.layer.weight, best["layer.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val_loss"},
        {"save_top_k": 0},
        {"every_n_train_steps": 5, "save_top_k": -1},
        {"every_n_epochs": 2},
        {"save_weights_only": True},
    ],
)
def test_last_is_the_newest_state(options: dict[str, Any]) -> None:
    callback = ModelCheckpoint(save_last=True, dirpath="c", **options)
    module = Net()
    fit(callback, module=module)
    newest = torch.load("c/last.ckpt", weights_only=True)
    assert newest["global_step"] == 12
    assert torch.equal(newest["state_dict"]["layer.weight"], module.layer.weight)
    assert ("optimizer_states" in newest) is not options.get("save_weights_only", False)
    assert callback.last_model_path == str(Path("c/last.ckpt").resolve())


def test_last_is_a_link_where_that_state_was_just_saved() -> None:
    fit(ModelCheckpoint(save_last="link", dirpath="c"))
    assert os.readlink("c/last.ckpt") == "epoch=2-step=12.ckpt"
    fit(ModelCheckpoint(save_last="link", monitor="val_loss", dirpath="d"))
    assert not os.path.islink("d/last.ckpt")
    assert checkpoints("d") == {"epoch=1-step=8.ckpt": 8, "last.ckpt": 12}


def test_last_may_be_named_otherwise() -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-newest"
        FILE_EXTENSION = ".pt"
        CHECKPOINT_EQUALS_CHAR = "_"

    callback = Named(save_top_k=0, save_last=True, dirpath="c")
    run = fit(callback, max_epochs=1)
    assert os.listdir("c") == ["epoch_0-newest.pt"]
    assert callback.find_last_checkpoints(run) == {os.path.realpath("c/epoch_0-newest.pt")}


def test_a_second_run_leaves_the_files_of_the_first_alone() -> None:
    fit(ModelCheckpoint(dirpath="c", save_last=True), max_epochs=1)
    with pytest.warns(UserWarning, match="has 2 of another run already"):
        fit(ModelCheckpoint(dirpath="c", save_last=True), max_epochs=1)
    names = {"epoch=0-step=4.ckpt", "epoch=0-step=4-v1.ckpt", "last.ckpt", "last-v1.ckpt"}
    assert set(checkpoints("c")) == names
    with pytest.warns(UserWarning, match="has 4 of another run already"):
        fit(ModelCheckpoint(dirpath="c", enable_version_counter=False), max_epochs=1)
    assert set(checkpoints("c")) == names


def test_a_value_that_validation_brings_is_waited_for() -> None:
    callback = ModelCheckpoint(every_n_train_steps=2, monitor="val_loss", save_top_k=-1)
    fit(callback)
    scores = {os.path.basename(path): round(float(score), 3) for path, score in callback.best_k_models.items()}
    assert scores == {
        "epoch=0-step=4.ckpt": 0.5,
        "epoch=1-step=6.ckpt": 0.5,
        "epoch=1-step=8.ckpt": 0.3,
        "epoch=2-step=10.ckpt": 0.3,
        "epoch=2-step=12.ckpt": 0.4,
    }


def test_nan_is_worse_than_any_number() -> None:
    callback = ModelCheckpoint(monitor="val_loss", dirpath="c")
    fit(callback, module=Net((math.nan, 2.0, math.nan)))
    assert checkpoints("c") == {"epoch=1-step=8.ckpt": 8}
    assert float(callback.best_model_score) == 2.0


def test_a_missing_value_is_an_error_that_lists_what_was_logged() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"monitor='loss'.*epoch, step, steps, train_loss, val/loss, val_loss"
    ):
        fit(ModelCheckpoint(monitor="loss"))


def test_a_missing_value_without_validation_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="monitor='loss'.*Nothing is saved until it is there") as caught:
        fit(ModelCheckpoint(monitor="loss"), module=Unvalidated())
    assert len([w for w in caught if "monitor='loss'" in str(w.message)]) == 1
    assert checkpoints() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 3}, "save_top_k=3.*without a monitor"),
        ({"mode": "avg"}, "'min' or 'max'"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_train_steps": 1, "every_n_epochs": 2}, "every_n_train_steps=1, every_n_epochs=2"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "give one of these intervals"),
        ({"save_last": "copy"}, "True, False or 'link'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ModelCheckpoint(**options)


def test_several_callbacks_keep_their_own() -> None:
    best = ModelCheckpoint(monitor="val_loss", filename="best-{epoch}")
    each = ModelCheckpoint(every_n_train_steps=6, filename="{step}", save_top_k=-1)
    run = fit(best, each)
    assert set(checkpoints("checkpoints")) == {"best-epoch=1.ckpt", "step=6.ckpt", "step=12.ckpt"}
    states = torch.load("checkpoints/step=12.ckpt", weights_only=True)["callbacks"]
    assert set(states) == {best.state_key, each.state_key}
    assert best.state_key == (
        "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
        "'train_time_interval': None}"
    )
    assert run.checkpoint_callbacks == [best, each]


def test_nothing_is_saved_by_a_dry_run_or_a_sanity_check() -> None:
    fit(ModelCheckpoint(save_last=True, train_time_interval=timedelta(0)), fast_dev_run=True)
    trainer(ModelCheckpoint()).validate(Net(), loader(1), verbose=False)
    assert checkpoints() == {}


class Stop(Exception):
    pass


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 6:
            raise Stop("now")
        return super().training_step(batch, batch_idx)


def test_an_exception_is_a_reason_to_save_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(Stop):
        fit(ModelCheckpoint(save_on_exception=True, save_last=True, dirpath="c"), module=Failing())
    assert checkpoints("c") == {"epoch=0-step=4.ckpt": 4, "epoch=1-step=6.ckpt": 6, "last.ckpt": 6}
    assert "because of Stop: now" in caplog.text
    with pytest.raises(Stop):
        fit(ModelCheckpoint(dirpath="d"), module=Failing())
    assert checkpoints("d") == {"epoch=0-step=4.ckpt": 4}


def resume(callback: ModelCheckpoint, path: str, module: Net | None = None) -> pl.Trainer:
    run = trainer(callback, max_epochs=6)
    module = module or Net()
    module.validations = 3
    run.fit(module, loader(), loader(1), ckpt_path=path)
    return run


def test_what_is_best_survives_a_restart() -> None:
    fit(ModelCheckpoint(monitor="val_loss", save_last=True, dirpath="c"))
    callback = ModelCheckpoint(monitor="val_loss", save_last=True, dirpath="c")
    resume(callback, "c/last.ckpt", Net((0.5, 0.3, 0.4, 0.35, 0.6, 0.7)))
    assert os.path.basename(callback.best_model_path) == "epoch=1-step=8.ckpt"
    assert round(float(callback.best_model_score), 3) == 0.3
    assert checkpoints("c") == {"epoch=1-step=8.ckpt": 8, "last.ckpt": 24}


def test_a_restart_elsewhere_keeps_what_is_there_and_removes_nothing_of_the_old_folder() -> None:
    fit(ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True, dirpath="c"))
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True, dirpath="d")
    resume(callback, "c/last.ckpt")
    kept = {os.path.relpath(path): round(float(score), 3) for path, score in callback.best_k_models.items()}
    assert kept == {"d/epoch=3-step=16.ckpt": 0.2, "d/epoch=5-step=24.ckpt": 0.1}
    assert checkpoints("c") == {"epoch=1-step=8.ckpt": 8, "epoch=2-step=12.ckpt": 12, "last.ckpt": 12}
    assert checkpoints("d") == {"epoch=3-step=16.ckpt": 16, "epoch=5-step=24.ckpt": 24, "last.ckpt": 24}


def test_a_folder_that_was_moved_is_found_again() -> None:
    fit(ModelCheckpoint(monitor="val_loss", save_last=True, dirpath="c"))
    shutil.move("c", "d")
    callback = ModelCheckpoint(monitor="val_loss", save_last=True, dirpath="d")
    resume(callback, "d/last.ckpt", Net((0.5, 0.3, 0.4, 0.35, 0.6, 0.7)))
    assert os.path.relpath(callback.best_model_path) == "d/epoch=1-step=8.ckpt"


def test_files_that_are_gone_are_no_longer_best() -> None:
    fit(ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True, dirpath="c"))
    os.remove("c/epoch=1-step=8.ckpt")
    state = torch.load("c/last.ckpt", weights_only=True)["callbacks"]
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, dirpath="c")
    with pytest.warns(UserWarning, match="are gone: .*epoch=1-step=8.ckpt"):
        callback.load_state_dict(state[callback.state_key])
    assert os.path.basename(callback.best_model_path) == "epoch=2-step=12.ckpt"
    assert round(float(callback.best_model_score), 3) == 0.4


def test_the_checkpoint_that_was_resumed_from_is_never_removed() -> None:
    fit(ModelCheckpoint(dirpath="c"))
    resume(ModelCheckpoint(dirpath="c"), "c/epoch=2-step=12.ckpt")
    assert checkpoints("c") == {"epoch=2-step=12.ckpt": 12, "epoch=5-step=24.ckpt": 24}


def test_loggers_hear_of_each_checkpoint() -> None:
    class Listening(CSVLogger):
        heard: list[str] = []

        def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
            self.heard.append(os.path.basename(checkpoint_callback.best_model_path))

    fit(ModelCheckpoint(), logger=Listening("."))
    assert Listening.heard == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]


@pytest.mark.parametrize(
    ("options", "arguments", "expected"),
    [
        ({}, {}, "epoch=2-step=7.ckpt"),
        ({"filename": "{epoch:03d}"}, {}, "epoch=002.ckpt"),
        ({"filename": "{missing:.2f}"}, {}, "missing=0.00.ckpt"),
        ({"filename": "{val-acc:.3f}_{step}"}, {"ver": 2}, "val-acc=0.250_step=7-v2.ckpt"),
        ({"filename": "x"}, {"prefix": "p"}, "p-x.ckpt"),
        ({"filename": "x"}, {"filename": "{epoch}"}, "epoch=2.ckpt"),
        ({"filename": "{epoch}", "dirpath": "/d"}, {}, "/d/epoch=2.ckpt"),
    ],
)
def test_names_are_formatted(options: dict[str, Any], arguments: dict[str, Any], expected: str) -> None:
    metrics = {"epoch": torch.tensor(2), "step": torch.tensor(7), "val-acc": torch.tensor(0.25)}
    assert ModelCheckpoint(**options).format_checkpoint_name(metrics, **arguments) == expected
