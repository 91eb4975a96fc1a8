"""Optimizers and schedulers from the command line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from lightlite.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau, instantiate_class
from lightlite.errors import MisconfigurationException

from .models import BARE, CommandData, CommandNet, Injected, OwnOptimizer, UnsavedCLI


def test_optimizer_and_scheduler_are_chosen_by_name() -> None:
    words = ["--optimizer=Adam", "--optimizer.lr=0.3", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=4"]
    cli = UnsavedCLI(CommandNet, run=False, args=words)
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["params"] == list(cli.model.parameters())
    assert (type(scheduler), scheduler.step_size, scheduler.optimizer) == (StepLR, 4, optimizer)


def test_reduce_on_plateau_watches_what_it_is_told_to() -> None:
    words = ["fit", *BARE, "--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss"]
    trainer = UnsavedCLI(CommandNet, CommandData, args=words).trainer
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, ReduceLROnPlateau)
    assert trainer.lr_scheduler_configs[0].monitor == "val_loss"


def test_one_class_can_be_fixed_and_its_arguments_left_open() -> None:
    class Fixed(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.AdamW)
            parser.add_lr_scheduler_args(ExponentialLR)

    cli = Fixed(CommandNet, run=False, args=["--optimizer.lr=0.2", "--lr_scheduler.gamma=0.5"])
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.AdamW, 0.2)
    assert (type(scheduler), scheduler.gamma) == (ExponentialLR, 0.5)


def test_only_the_classes_of_a_tuple_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    class Either(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args((torch.optim.SGD, torch.optim.Adam))

    with pytest.raises(SystemExit, match="2"):
        Either(CommandNet, run=False, args=["--optimizer=Adagrad"])
    assert "Adagrad" in capsys.readouterr().err


def test_the_arguments_can_go_to_the_module_instead() -> None:
    class Linked(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(nested_key="generator", link_to="model.first")
            parser.add_optimizer_args(torch.optim.SGD, nested_key="discriminator", link_to="model.second")

    made = []

    class TwoOptimizers(CommandNet):
        def __init__(self, first: dict[str, Any], second: dict[str, Any]) -> None:
            super().__init__()
            made.extend(instantiate_class(self.parameters(), init) for init in (first, second))

    Linked(TwoOptimizers, run=False, args=["--generator=Adagrad", "--generator.lr=0.3", "--discriminator.lr=0.2"])
    assert [(type(each), each.param_groups[0]["lr"]) for each in made] == [
        (torch.optim.Adagrad, 0.3),
        (torch.optim.SGD, 0.2),
    ]


def test_two_automatic_optimizers_are_refused() -> None:
    class Twice(UnsavedCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(nested_key="one")
            parser.add_optimizer_args(nested_key="two")

    with pytest.raises(MisconfigurationException, match="arguments of one, two, lr_scheduler are all link_to='AUTOM"):
        Twice(CommandNet, run=False, args=["--one=SGD", "--two=Adam"])


def test_what_makes_an_optimizer_can_be_an_argument() -> None:
    words = ["--model.optimizer=SGD", "--model.optimizer.lr=0.01", "--model.scheduler=StepLR"]
    cli = UnsavedCLI(
        Injected, auto_configure_optimizers=False, run=False, args=[*words, "--model.scheduler.step_size=2"]
    )
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.SGD, 0.01)
    assert (type(scheduler), scheduler.step_size) == (StepLR, 2)
    assert "optimizer" not in cli.config


def test_configure_optimizers_of_the_command_line_can_be_overridden() -> None:
    class Doubling(UnsavedCLI):
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            optimizer.param_groups[0]["lr"] *= 2
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    words = ["fit", *BARE, "--optimizer=SGD", "--optimizer.lr=0.25", "--lr_scheduler=StepLR"]
    cli = Doubling(CommandNet, CommandData, args=[*words, "--lr_scheduler.step_size=9"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert cli.trainer.lr_scheduler_configs[0].interval == "step"


def test_a_module_that_brings_its_optimizer_is_told_when_another_takes_its_place() -> None:
    assert UnsavedCLI(OwnOptimizer, run=False, args=[]).model.configure_optimizers().param_groups[0]["lr"] == 0.1
    with pytest.warns(UserWarning, match=r"OwnOptimizer.configure_optimizers is not used.*torch.optim.Adam"):
        cli = UnsavedCLI(OwnOptimizer, run=False, args=["--optimizer=Adam"])
    assert type(cli.model.configure_optimizers()) is torch.optim.Adam


def test_parameters_that_are_made_late_are_optimized_too() -> None:
    class Late(CommandNet):
        def configure_model(self) -> None:
            self.second = torch.nn.Linear(2, 1)

    cli = UnsavedCLI(Late, CommandData, args=["fit", *BARE, "--optimizer=SGD"])
    assert cli.trainer.optimizers[0].param_groups[0]["params"] == list(cli.model.parameters())


def test_a_copy_of_the_module_optimizes_its_own_parameters() -> None:
    copied = copy.deepcopy(LightningCLI(CommandNet, run=False, args=["--optimizer=SGD"]).model)
    assert copied.configure_optimizers().param_groups[0]["params"][0] is copied.first.weight
