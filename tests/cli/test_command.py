"""Subcommands, what they make and run, and what can be overridden."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightlite as pl
from lightlite.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightlite.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau, SaveConfigCallback
from lightlite.errors import MisconfigurationException
from lightlite.loggers import CSVLogger, TensorBoardLogger

from .models import BARE, SGD, CommandData, CommandNet, DeepNet, OwnOptimizer, UnsavedCLI, state


def test_fit_trains_the_module_that_the_words_describe() -> None:
    cli = UnsavedCLI(CommandNet, CommandData, args=["fit", *BARE, *SGD, "--model.hidden=3", "--data.samples=6"])
    torch.manual_seed(0)
    expected, batches = CommandNet(hidden=3), CommandData(samples=6).loader()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.03)
    for batch in batches:
        optimizer.zero_grad()
        expected.loss(batch).backward()
        optimizer.step()
    assert cli.subcommand == "fit"
    assert cli.trainer.global_step == 3
    assert state(cli.model) == state(expected)


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_runs_without_an_optimizer(subcommand: str) -> None:
    cli = UnsavedCLI(CommandNet, CommandData, args=[subcommand, *BARE, "--verbose=false"])
    assert list(cli.trainer.callback_metrics) == [{"validate": "val_loss"}.get(subcommand, "test_loss")]


def test_predict_takes_the_arguments_of_the_method() -> None:
    given = []

    class Predicting(UnsavedCLI):
        def predict(self, **kwargs: Any) -> None:
            given.append(kwargs)

    cli = Predicting(CommandNet, CommandData, args=["predict", *BARE, "--return_predictions=false"])
    assert given == [
        {
            "model": cli.model,
            "datamodule": cli.datamodule,
            "return_predictions": False,
            "ckpt_path": None,
            "weights_only": None,
        }
    ]


def test_without_run_everything_is_made_and_nothing_run() -> None:
    cli = LightningCLI(CommandNet, CommandData, run=False, args=["--model.lr=0.2", "--trainer.max_epochs=7"])
    assert cli.subcommand is None
    assert (cli.model.lr, cli.trainer.max_epochs, cli.trainer.global_step) == (0.2, 7, 0)
    assert isinstance(cli.datamodule, CommandData)
    assert any(isinstance(callback, SaveConfigCallback) for callback in cli.trainer.callbacks)


def test_hooks_come_around_what_they_are_named_for() -> None:
    calls = []

    class Hooked(UnsavedCLI):
        def before_instantiate_classes(self) -> None:
            calls.append(("before_instantiate_classes", self.config.fit.model.lr, hasattr(self, "model")))

        def after_instantiate_classes(self) -> None:
            calls.append(("after_instantiate_classes", self.trainer.global_step))

        def before_fit(self) -> None:
            calls.append(("before_fit", self.trainer.global_step))

        def after_fit(self) -> None:
            calls.append(("after_fit", self.trainer.global_step))

        def before_test(self) -> None:
            calls.append(("before_test",))

    Hooked(OwnOptimizer, CommandData, args=["fit", *BARE])
    assert calls == [
        ("before_instantiate_classes", 0.1, False),
        ("after_instantiate_classes", 0),
        ("before_fit", 0),
        ("after_fit", 2),
    ]


def test_a_trainer_of_ones_own_brings_subcommands_along() -> None:
    class Counting(pl.Trainer):
        def count(self, model: pl.LightningModule, upto: int = 3) -> None:
            """Count.

            Args:
                model: The module.
                upto: How far.
            """
            self.counted = list(range(upto))

    class CountingCLI(UnsavedCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "count": {"model"}}

    cli = CountingCLI(CommandNet, trainer_class=Counting, args=["count", "--upto=2"])
    assert cli.trainer.counted == [0, 1]


def test_functions_may_stand_for_classes() -> None:
    def narrow_net(factor: int = 2) -> CommandNet:
        return CommandNet(hidden=2 * factor)

    def slow_trainer(epochs: int = 1) -> pl.Trainer:
        return pl.Trainer(max_epochs=epochs, logger=False)

    with pytest.warns(UserWarning, match="slow_trainer has no argument 'callbacks'"):
        cli = LightningCLI(narrow_net, trainer_class=slow_trainer, run=False, args=["--model.factor=3"])
    assert cli.model.first.out_features == 6
    assert dict(cli.model.hparams) == {"hidden": 6, "lr": 0.1}


def test_any_imported_subclass_can_be_chosen_by_its_name() -> None:
    words = ["--model=DeepNet", "--model.depth=5", "--model.hidden=3", "--data=CommandData", "--data.samples=2"]
    cli = UnsavedCLI(run=False, args=words)
    assert type(cli.model) is DeepNet
    assert (cli.model.depth, cli.model.first.out_features) == (5, 3)
    assert cli.datamodule is not None
    assert cli.datamodule.samples == 2
    path = f"{DeepNet.__module__}.DeepNet"
    assert type(UnsavedCLI(CommandNet, subclass_mode_model=True, run=False, args=["--model", path]).model) is DeepNet


def test_callbacks_come_from_words_defaults_and_arguments_of_their_own() -> None:
    class Stopping(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(EarlyStopping, "stop")
            parser.set_defaults({"stop.monitor": "val_loss", "stop.patience": 5})

    words = [
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss", "--trainer.callbacks+=Timer",
        "--trainer.callbacks.interval=epoch", "--stop.patience=7",
    ]  # fmt: skip
    defaults = {"callbacks": LearningRateMonitor(), "max_epochs": 3, "enable_progress_bar": False}
    cli = Stopping(CommandNet, trainer_defaults=defaults, run=False, args=words)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names == ["Timer", "EarlyStopping", "LearningRateMonitor", "ModelSummary", "ModelCheckpoint"]
    assert cli.trainer.early_stopping_callback is not None
    assert cli.trainer.early_stopping_callback.patience == 7
    assert isinstance(cli.trainer.checkpoint_callback, ModelCheckpoint)
    assert cli.trainer.checkpoint_callback.monitor == "val_loss"
    assert cli.trainer.max_epochs == 3


def test_loggers_strategies_and_plugins_go_by_short_names() -> None:
    words = [
        "--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=a", "--trainer.logger.name=runs",
        "--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=b",
        "--trainer.strategy=DDPStrategy", "--trainer.strategy.process_group_backend=gloo", "--trainer.devices=1",
        "--trainer.accelerator=cpu", "--trainer.plugins=DoublePrecision",
    ]  # fmt: skip
    trainer = UnsavedCLI(CommandNet, run=False, args=words).trainer
    assert [type(logger) for logger in trainer.loggers] == [CSVLogger, TensorBoardLogger]
    assert trainer.log_dir is not None
    assert trainer.log_dir.endswith("a/runs/version_0")
    assert (type(trainer.strategy).__name__, trainer.precision) == ("DDPStrategy", "64-true")
    assert trainer.strategy.process_group_backend == "gloo"


@pytest.mark.parametrize(("applied", "key"), [("parse", "data.batch_size"), ("instantiate", "data.width")])
def test_an_argument_can_be_linked_to_another(applied: str, key: str) -> None:
    class Linked(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments(key, "model.hidden", apply_on=applied)

    cli = Linked(CommandNet, CommandData, run=False, args=["--data.batch_size=5"])
    hidden = 5 if applied == "parse" else 6
    assert cli.model.first.out_features == hidden
    assert cli.model.hparams["hidden"] == hidden


@pytest.mark.parametrize(("given", "kept"), [("true", 0), ("7", 7), ("false", False), ("null", None)])
def test_the_seed_is_set_before_anything_is_made(given: str, kept: Any) -> None:
    torch.manual_seed(99)
    cli = UnsavedCLI(CommandNet, run=False, args=[f"--seed_everything={given}"])
    torch.manual_seed(kept if kept is not None and kept is not False else 99)
    assert state(cli.model) == state(CommandNet())
    assert cli.config["seed_everything"] is kept or cli.config["seed_everything"] == kept


def test_the_seed_of_the_environment_is_what_true_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "31")
    assert UnsavedCLI(CommandNet, run=False, args=[]).config["seed_everything"] == 31
    assert UnsavedCLI(CommandNet, run=False, seed_everything_default=4, args=[]).config["seed_everything"] == 4


def test_every_argument_of_the_trainer_is_explained_with_its_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        UnsavedCLI(CommandNet, CommandData, args=["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("accelerator", "precision", "plugins", "max_time", "val_check_interval", "deterministic", "timeout"):
        help_of = text[text.index(f"--trainer.{name} {name.upper()}") :]
        help_of = help_of[: help_of.index("default: ")]
        assert "(type: " in help_of, help_of
        assert "Any" not in help_of, help_of
    assert "(type: int | null, default: null)" in text
    assert "--model.hidden HIDDEN Width between them. (type: int, default: 2)" in text


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], "Score every sample of the validation data once."),
        (["fit", "--optimizer.help=SGD"], "--optimizer.momentum"),
        (["fit", "--trainer.callbacks.help=EarlyStopping"], "--trainer.callbacks.patience"),
    ],
)
def test_help_can_be_had_of_what_can_be_chosen(
    words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        UnsavedCLI(CommandNet, CommandData, args=words)
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "{fit,validate,test,predict}"),
        (["fti"], "invalid choice: 'fti'"),
        (["fit", "--model.hiden=3"], "unrecognized arguments: --model.hiden=3"),
        (["fit", "--model.hidden=three"], "Got value: three"),
        (["fit", "--trainer.precision=7"], "'bf16-mixed'"),
        (["fit", "--optimizer=Dam"], "Given value: Dam"),
        (["fit", "--config=none.yaml"], "none.yaml"),
    ],
)
def test_a_wrong_word_ends_the_program_saying_which(
    words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        UnsavedCLI(CommandNet, CommandData, args=words)
    assert shown in capsys.readouterr().err


def test_words_beside_given_arguments_are_told_to_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", "--model.lr=1"])
    with pytest.warns(UserWarning, match=r"are not read: \['--model.lr=1'\]"):
        assert UnsavedCLI(CommandNet, run=False, args={"model": {"lr": 0.5}}).model.lr == 0.5


def test_what_is_no_class_and_no_annotated_function_is_refused() -> None:
    def unannotated():  # type: ignore[no-untyped-def]
        return CommandNet()

    with pytest.raises(MisconfigurationException, match=r"unannotated.* is neither a class nor a function annotated"):
        LightningCLI(unannotated, args=[])
    with pytest.raises(
        MisconfigurationException, match=r"add_lightning_class_args.SGD, 'model'.: it is none of Trainer"
    ):
        LightningCLI(torch.optim.SGD, run=False, args=[])  # type: ignore[arg-type]
    parser = LightningArgumentParser()
    with pytest.raises(
        MisconfigurationException, match=r"'optimizer' were to be .*CommandNet.*give a subclass of Optimizer"
    ):
        parser.add_optimizer_args(CommandNet)
    with pytest.raises(MisconfigurationException, match="give a subclass of LRScheduler or ReduceLROnPlateau"):
        parser.add_lr_scheduler_args((ReduceLROnPlateau, torch.optim.SGD))
