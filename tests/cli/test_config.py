"""Configuration: from files, from the environment, printed, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightlite.cli import LightningCLI, SaveConfigCallback

from .models import BARE, SGD, CommandData, CommandNet, Composed, UnsavedCLI, state

WORDS = ["fit", *BARE, *SGD]
UNSET = """
    precision logger callbacks max_epochs min_epochs min_steps max_time limit_train_batches limit_val_batches
    limit_test_batches limit_predict_batches val_check_interval num_sanity_val_steps log_every_n_steps
    enable_checkpointing enable_progress_bar enable_model_summary gradient_clip_val gradient_clip_algorithm
    deterministic benchmark profiler plugins default_root_dir model_registry timeout
"""


def test_later_files_and_words_come_before_earlier_ones() -> None:
    Path("one.yaml").write_text("model: {hidden: 5, lr: 0.4}\ntrainer: {max_epochs: 1}\n")
    Path("two.yaml").write_text("model:\n  lr: 0.3\n")
    Path("model.yaml").write_text("hidden: 6\n")
    words = ["--config=one.yaml", "-c", "two.yaml"]
    model = UnsavedCLI(CommandNet, run=False, args=words).model
    assert (model.hparams.hidden, model.lr) == (5, 0.3)
    words += ["--model=model.yaml", "--model.lr=0.2"]
    model = UnsavedCLI(CommandNet, run=False, args=words).model
    assert (model.hparams.hidden, model.lr) == (6, 0.2)


def test_a_file_may_hold_the_configuration_of_every_subcommand() -> None:
    Path("all.yaml").write_text("fit:\n  model: {lr: 0.6}\n")
    Path("fit.yaml").write_text("model: {hidden: 7}\n")
    kwargs = {"fit": {"default_config_files": ["fit.yaml"]}}
    model = UnsavedCLI(CommandNet, CommandData, parser_kwargs=kwargs, args=["--config=all.yaml", *WORDS]).model
    assert (model.lr, model.first.out_features) == (0.6, 7)


def test_configuration_can_be_given_as_objects() -> None:
    cli = UnsavedCLI(CommandNet, CommandData, run=False, args={"model": {"lr": 0.25}, "trainer": {"max_epochs": 2}})
    assert (cli.model.lr, cli.trainer.max_epochs) == (0.25, 2)


def test_environment_variables_are_read_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_MODEL__LR", "0.7")
    monkeypatch.setenv("PL_FIT__MODEL__LR", "0.8")
    assert UnsavedCLI(CommandNet, run=False, args=[]).model.lr == 0.1
    assert UnsavedCLI(CommandNet, run=False, parser_kwargs={"default_env": True}, args=[]).model.lr == 0.7
    assert UnsavedCLI(CommandNet, CommandData, parser_kwargs={"default_env": True}, args=WORDS).model.lr == 0.8


def test_what_is_printed_gives_the_same_run_as_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--model.hidden=3", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    with pytest.raises(SystemExit, match="0"):
        UnsavedCLI(CommandNet, CommandData, args=[*words, "--print_config"])
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    again = UnsavedCLI(CommandNet, CommandData, args=["fit", "--config=printed.yaml"])
    assert printed.startswith("# lightlite==")
    assert again.trainer.early_stopping_callback is not None
    assert state(again.model) == state(UnsavedCLI(CommandNet, CommandData, args=words).model)


def test_the_keys_are_lightnings_with_one_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        LightningCLI(CommandNet, CommandData, args=["fit", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    trainer = printed.pop("trainer")
    assert printed == {
        "seed_everything": True,
        "model": {"hidden": 2, "lr": 0.1},
        "data": {"samples": 4, "batch_size": 2},
        "optimizer": None,
        "lr_scheduler": None,
        "ckpt_path": None,
        "weights_only": None,
    }
    assert trainer == {
        **dict.fromkeys(("accelerator", "strategy", "devices"), "auto"),
        **dict.fromkeys(UNSET.split()),
        **dict.fromkeys(("fast_dev_run", "detect_anomaly", "barebones", "sync_batchnorm"), False),
        **dict.fromkeys(("inference_mode", "use_distributed_sampler", "enable_autolog_hparams"), True),
        **dict.fromkeys(("num_nodes", "check_val_every_n_epoch", "accumulate_grad_batches"), 1),
        "max_steps": -1,
        "overfit_batches": 0.0,
        "reload_dataloaders_every_n_epochs": 0,
    }


def test_a_run_saves_its_configuration_beside_what_it_logs() -> None:
    words = [word for word in WORDS if "logger" not in word]
    cli = LightningCLI(
        CommandNet, CommandData, args=[*words, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    )
    saved = Path("logs/lightning_logs/version_0/config.yaml")
    assert Path(str(cli.trainer.log_dir)).resolve() == saved.parent.resolve()
    content = yaml.safe_load(saved.read_text())
    assert content["optimizer"] == {
        "class_path": "torch.optim.SGD",
        "init_args": {**content["optimizer"]["init_args"], "lr": 0.03},
    }
    assert content["seed_everything"] == 0
    again = UnsavedCLI(CommandNet, CommandData, args=["fit", f"--config={saved}"])
    assert state(again.model) == state(cli.model)


def test_a_saved_configuration_is_overwritten_on_request_only() -> None:
    LightningCLI(CommandNet, CommandData, args=[*WORDS, "--model.lr=0.5"])
    with pytest.raises(RuntimeError, match=r'config.yaml is there already.*save_config_kwargs={"overwrite": True}'):
        LightningCLI(CommandNet, CommandData, args=[*WORDS, "--model.lr=0.6"])
    assert yaml.safe_load(Path("config.yaml").read_text())["model"]["lr"] == 0.5
    LightningCLI(CommandNet, CommandData, save_config_kwargs={"overwrite": True}, args=[*WORDS, "--model.lr=0.7"])
    assert yaml.safe_load(Path("config.yaml").read_text())["model"]["lr"] == 0.7


def test_files_of_parts_are_saved_as_files_where_that_is_asked_for() -> None:
    Path("in").mkdir()
    Path("in/model.yaml").write_text("lr: 0.44\n")
    Path("in/run.yaml").write_text("model: model.yaml\n")
    kwargs = {"multifile": True, "config_filename": "run.yaml"}
    LightningCLI(CommandNet, CommandData, save_config_kwargs=kwargs, args=["fit", "--config=in/run.yaml", *WORDS[1:]])
    assert yaml.safe_load(Path("run.yaml").read_text())["model"] == "model.yaml"
    assert yaml.safe_load(Path("model.yaml").read_text())["lr"] == 0.44


def test_saving_can_be_something_else() -> None:
    saved: list[Any] = []

    class Keep(SaveConfigCallback):
        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            saved.append((stage, yaml.safe_load(self.parser.dump(self.config, skip_unset=False))["model"]["lr"]))

    kwargs = {"save_to_log_dir": False}
    LightningCLI(
        CommandNet, CommandData, save_config_callback=Keep, save_config_kwargs=kwargs, args=[*WORDS, "--model.lr=0.5"]
    )
    assert saved == [("fit", 0.5)]
    assert not Path("config.yaml").exists()
    with pytest.raises(ValueError, match=r"save_to_log_dir=False. would save nothing: override save_config"):
        LightningCLI(CommandNet, CommandData, save_config_kwargs=kwargs, args=WORDS)


def test_a_trial_run_saves_nothing() -> None:
    LightningCLI(CommandNet, CommandData, args=[*WORDS, "--trainer.fast_dev_run=1"])
    assert not Path("config.yaml").exists()


def test_parts_within_parts_are_made_and_dumped() -> None:
    words = ["--model.encoder=Encoder", "--model.encoder.width=2", "--model.activation=torch.nn.ReLU"]
    cli = UnsavedCLI(Composed, run=False, args=[*words, "--model.options.dropout=0.25"])
    assert (cli.model.first.hparams.width, cli.model.options.dropout) == (2, 0.25)
    assert cli.config.model.encoder.class_path.endswith(".Encoder")
