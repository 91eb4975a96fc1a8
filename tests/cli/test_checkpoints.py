"""Checkpoints of runs from the command line: what they hold, and what is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightlite as pl
from lightlite.cli import LightningArgumentParser
from lightlite.errors import CheckpointError

from .models import BARE, QUIET, SGD, CommandData, CommandNet, Composed, DeepNet, Encoder, Options, UnsavedCLI, state

SAVED = "saved/last.ckpt"
KEEP = ("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=saved", "--trainer.callbacks.filename=last")
MARK = {"_instantiator": "pytorch_lightning.cli.instantiate_module"}
HERE = CommandNet.__module__


def fitted(*classes: Any, words: tuple[str, ...] = ()) -> UnsavedCLI:
    return UnsavedCLI(*classes, args=["fit", *QUIET, *KEEP, *SGD, *words])


def changed(**hparams: Any) -> str:
    """A copy of the checkpoint with other hyper-parameters."""
    checkpoint = torch.load(SAVED, weights_only=True)
    checkpoint["hyper_parameters"].update(hparams)
    torch.save(checkpoint, "changed.ckpt")
    return "changed.ckpt"


def test_a_checkpoint_holds_what_was_parsed() -> None:
    cli = fitted(CommandNet, CommandData, words=("--model.hidden=3",))
    checkpoint = torch.load(SAVED, weights_only=True)
    assert checkpoint["hyper_parameters"] == {"hidden": 3, "lr": 0.1, **MARK}
    assert checkpoint["datamodule_hyper_parameters"] == {"samples": 4, "batch_size": 2, **MARK}
    assert checkpoint["hparams_name"] == "kwargs"
    assert state(CommandNet.load_from_checkpoint(SAVED)) == state(cli.model)
    assert CommandNet.load_from_checkpoint(SAVED, lr=0.7).lr == 0.7
    assert CommandData.load_from_checkpoint(SAVED).samples == 4


def test_a_chosen_class_is_found_again_by_its_base() -> None:
    cli = fitted(
        words=("--model=DeepNet", "--model.depth=4", "--model.hidden=3", "--data=CommandData", "--data.samples=6")
    )
    assert torch.load(SAVED, weights_only=True)["hyper_parameters"] == {
        "_class_path": f"{HERE}.DeepNet", "depth": 4, "hidden": 3, "lr": 0.1, **MARK
    }  # fmt: skip
    model = pl.LightningModule.load_from_checkpoint(SAVED)
    assert (type(model), model.depth) == (DeepNet, 4)
    assert state(model) == state(cli.model)
    assert pl.LightningDataModule.load_from_checkpoint(SAVED).samples == 6
    with pytest.raises(CheckpointError, match=r"one of .*DeepNet, which is no subclass of Encoder; call load_from_ch"):
        Encoder.load_from_checkpoint(SAVED)


def test_parts_within_parts_are_made_again() -> None:
    words = ("--model.encoder=Encoder", "--model.activation=torch.nn.ReLU", "--model.options.name=some")
    cli = fitted(Composed, CommandData, words=words)
    assert dict(cli.model.first.hparams) == {"width": 2}
    assert torch.load(SAVED, weights_only=True)["hyper_parameters"] == {
        "encoder": {"class_path": f"{HERE}.Encoder", "init_args": {"width": 2}},
        "activation": {"class_path": "torch.nn.ReLU", "init_args": {"inplace": False}},
        "options": {"dropout": 0.5, "name": "some"},
        **MARK,
    }
    model = Composed.load_from_checkpoint(SAVED)
    assert (type(model.activation), model.options) == (nn.ReLU, Options(name="some"))
    assert state(model) == state(cli.model)
    assert type(Composed.load_from_checkpoint(SAVED, activation=nn.Tanh()).activation) is nn.Tanh


def test_without_that_support_init_arguments_are_kept() -> None:
    cli = UnsavedCLI(CommandNet, run=False, load_from_checkpoint_support=False, args=["--model.hidden=3"])
    assert dict(cli.model.hparams) == {"hidden": 3, "lr": 0.1}


def test_values_that_come_by_links_are_kept() -> None:
    class Linked(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.width", "model.init_args.hidden", apply_on="instantiate")

    cli = Linked(CommandNet, CommandData, subclass_mode_model=True, run=False, args=["--model=DeepNet"])
    assert dict(cli.model.hparams) == {"_class_path": f"{HERE}.DeepNet", "depth": 1, "hidden": 3, "lr": 0.1, **MARK}


def test_a_checkpoints_hyper_parameters_are_the_defaults_of_a_further_call() -> None:
    trained = fitted(CommandNet, CommandData, words=("--model.hidden=3", "--model.lr=0.9"))
    again = UnsavedCLI(CommandNet, CommandData, args=["test", *BARE, f"--ckpt_path={SAVED}"])
    assert dict(again.config.test.model) == {"hidden": 3, "lr": 0.9}
    assert state(again.model) == state(trained.model)


def test_what_is_said_comes_before_what_a_checkpoint_says() -> None:
    fitted(CommandNet, CommandData, words=("--model.hidden=3", "--model.lr=0.9"))
    Path("rate.yaml").write_text("model: {lr: 0.25}\n")
    for said in ("--model.lr=0.25", "--config=rate.yaml"):
        again = UnsavedCLI(CommandNet, CommandData, args=["test", *BARE, f"--ckpt_path={SAVED}", said])
        assert dict(again.config.test.model) == {"hidden": 3, "lr": 0.25}


def test_a_chosen_class_gets_the_hyper_parameters_of_the_checkpoint() -> None:
    fitted(words=("--model=DeepNet", "--model.depth=4", "--model.hidden=3", "--data=CommandData"))
    words = ["test", *BARE, f"--ckpt_path={SAVED}", "--data=CommandData", "--model=DeepNet", "--model.lr=0.7"]
    model = UnsavedCLI(args=words).model
    assert (type(model), model.depth, model.first.out_features, model.lr) == (DeepNet, 4, 3, 0.7)


def test_hyper_parameters_without_an_argument_are_left_alone() -> None:
    fitted(CommandNet, CommandData)
    again = UnsavedCLI(CommandNet, CommandData, args=["test", *BARE, f"--ckpt_path={changed(lr=0.4, found_later=7)}"])
    assert dict(again.config.test.model) == {"hidden": 2, "lr": 0.4}


def test_a_wrong_value_in_a_checkpoint_says_where_it_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(words=("--model=CommandNet", "--data=CommandData"))
    with pytest.raises(SystemExit, match="2"):
        UnsavedCLI(
            args=["test", *BARE, "--model=CommandNet", "--data=CommandData", f"--ckpt_path={changed(lr='fast')}"]
        )
    assert "Got value: fast" in (said := capsys.readouterr().err)
    assert "the hyper-parameters in changed.ckpt are the defaults of --model" in said


def test_nothing_is_imported_or_called_because_a_checkpoint_says_so() -> None:
    Path("intruder.py").write_text("raise SystemExit('imported')\n")
    fitted(words=("--model=DeepNet", "--data=CommandData"))
    with pytest.raises(CheckpointError, match=r"'os.system' made the object, which is not called: allowed are"):
        pl.LightningModule.load_from_checkpoint(changed(_instantiator="os.system"))
    words = ["test", *BARE, "--model=DeepNet", "--data=CommandData", "--ckpt_path=changed.ckpt"]
    for hparams in (
        {"_class_path": "intruder.CommandNet"},
        {"_class_path": "os.system"},
        {"lr": [{"class_path": "intruder.X"}]},
    ):
        changed(**hparams)
        with pytest.raises(CheckpointError, match=r"name the class .* which this program has not imported; nothing is"):
            pl.LightningModule.load_from_checkpoint("changed.ckpt")
        with pytest.raises(CheckpointError, match=r"hyper-parameters in changed.ckpt name the class"):
            UnsavedCLI(args=words)
