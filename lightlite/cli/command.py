"""LightningCLI: from the command line to a run."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from torch.optim import Optimizer

import lightlite
from lightlite.callbacks import Callback
from lightlite.cli.checkpoints import Maker, take_hyperparameters
from lightlite.cli.optimizers import (
    Choice,
    LRSchedulerTypeUnion,
    ReduceLROnPlateau,
    configure_from,
)
from lightlite.cli.parser import LightningArgumentParser, Namespace, class_of
from lightlite.cli.save_config import SaveConfigCallback
from lightlite.datamodule import LightningDataModule
from lightlite.errors import MisconfigurationException
from lightlite.hooks import is_overridden
from lightlite.module import LightningModule
from lightlite.trainer import Trainer
from lightlite.utilities.rank_zero import rank_zero_warn
from lightlite.utilities.seed import SEED_VARIABLE, seed_everything

ArgsType: TypeAlias = list[str] | dict[str, Any] | Namespace | None
"""What may be given as `args`: words of a command line, or the configuration itself."""


class LightningCLI:
    """A command line for a module, its data and a Trainer: parses, makes them, and runs what was asked for.

        LightningCLI(Net, Data)     # python main.py fit --model.lr=0.1 --trainer.max_epochs=3 --config more.yaml

    Making one is running it, in this order: `setup_parser`, `parse_arguments`, seeding, `before_instantiate_classes`,
    `instantiate_classes`, `after_instantiate_classes`, and of the subcommand `before_fit`, `Trainer.fit`, `after_fit`.
    Every one may be overridden. Semantics are those of Lightning 2.6.

    Args:
        model_class: The module's class, or a function annotated to return one. None for a choice on the command line.
        datamodule_class: The data module's, likewise; None where there may be none.
        save_config_callback: What saves the configuration of a run; None for nothing.
        save_config_kwargs: Further arguments of it.
        trainer_class: The trainer's class, or a function annotated to return one.
        trainer_defaults: Other defaults of the trainer's arguments; `callbacks` are always there, besides those asked
            for.
        seed_everything_default: Seed unless another is given; True for what PL_GLOBAL_SEED says, or 0; False for none.
        parser_kwargs: Arguments of the parser; those of one subcommand's parser below its name.
        parser_class: The parser's class.
        subclass_mode_model: Whether `--model` may name any subclass of `model_class`.
        subclass_mode_data: Whether `--data` may name any subclass of `datamodule_class`.
        args: What to parse instead of the command line.
        run: Whether there are subcommands, one of which is run. If not, everything is made and nothing run.
        auto_configure_optimizers: Whether there are `--optimizer` and `--lr_scheduler`, which become the module's
            `configure_optimizers`.
        load_from_checkpoint_support: Whether `save_hyperparameters` keeps what was parsed, from which
            `load_from_checkpoint` can make objects within objects, rather than what `__init__` was given.

    Attributes:
        config: What was parsed.
        config_init: The same, with objects made.
        subcommand: "fit", "validate", "test" or "predict"; None with `run=False`.
        parser: The parser.
        model: The module.
        datamodule: The data module, or None.
        trainer: The trainer.
    """

    config: Namespace
    config_init: Namespace
    subcommand: str | None
    parser: LightningArgumentParser
    model: LightningModule
    datamodule: LightningDataModule | None
    trainer: Trainer

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.model_class, self.datamodule_class, self.trainer_class = model_class, datamodule_class, trainer_class
        self.subclass_mode_model = subclass_mode_model or model_class is None
        self.subclass_mode_data = subclass_mode_data or datamodule_class is None
        self.save_config_callback, self.save_config_kwargs = save_config_callback, save_config_kwargs or {}
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs, self.parser_class = parser_kwargs or {}, parser_class
        self.auto_configure_optimizers = auto_configure_optimizers
        self.load_from_checkpoint_support = load_from_checkpoint_support
        self._classes = {
            "trainer": class_of(trainer_class),
            "model": class_of(model_class or LightningModule),
            "data": class_of(datamodule_class or LightningDataModule),
        }
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        self._subcommand_arguments: dict[str, list[str]] = {}
        names = self.subcommands() if run else {}
        kwargs_of = {name: value for name, value in self.parser_kwargs.items() if name in names}
        main_kwargs = {name: value for name, value in self.parser_kwargs.items() if name not in self.subcommands()}
        self.setup_parser(run, main_kwargs, kwargs_of)
        self._parse(args)
        self.subcommand = self.config["subcommand"] if run else None
        self._seed()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # What can be asked for.

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that can be run, each with those of its arguments that are not on the command line."""
        given = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": given,
            "test": given,
            "predict": given,
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """An empty parser, with `--config`.

        Args:
            kwargs: Arguments of the parser's class.
        """
        parser = self.parser_class(**{"dump_header": [f"lightlite=={lightlite.__version__}"], **kwargs})
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file, YAML or JSON.")
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make `self.parser`.

        Args:
            add_subcommands: Whether there are subcommands.
            main_kwargs: Arguments of the parser.
            subparser_kwargs: By subcommand, those of its parser.
        """
        self.parser = self.init_parser(**main_kwargs)
        if not add_subcommands:
            self._add_arguments(self.parser)
            return
        actions = self.parser.add_subcommands()
        for name, left_out in self.subcommands().items():
            method = getattr(self._classes["trainer"], name)
            summary = (inspect.getdoc(method) or "").partition("\n")[0]
            parser = self.init_parser(**{"description": summary, **subparser_kwargs.get(name, {})})
            self._add_arguments(parser)
            self._subcommand_arguments[name] = parser.add_method_arguments(
                self._classes["trainer"], name, skip=set(left_out)
            )
            self._subcommand_parsers[name] = parser
            actions.add_subcommand(name, parser, help=summary)

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers and not parser.optimizer_choices:
            parser.add_optimizer_args()
        if self.auto_configure_optimizers and not parser.lr_scheduler_choices:
            parser.add_lr_scheduler_args()
        self.link_optimizers_and_lr_schedulers(parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--seed_everything`."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int | None,
            default=self.seed_everything_default,
            help="Seed of all random generators; true for what PL_GLOBAL_SEED says, or 0; false or null for none.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of trainer, module and data module."""
        parser.add_lightning_class_args(self._classes["trainer"], "trainer")
        parser.set_defaults(
            {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        )
        parser.add_lightning_class_args(self._classes["model"], "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(
            self._classes["data"],
            "data",
            subclass_mode=self.subclass_mode_data,
            required=self.datamodule_class is not None,  # a module may have loaders of its own
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override to add arguments, or to link some.

        Args:
            parser: The parser, or with subcommands each one's.
        """

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Hand the chosen optimizers and schedulers to the arguments that `link_to` names."""
        for key, choice in {**parser.optimizer_choices, **parser.lr_scheduler_choices}.items():
            if isinstance(choice.classes, tuple) and not choice.automatic:
                parser.link_arguments(key, choice.link_to)
            elif not choice.automatic:
                parser.link_arguments(key, choice.link_to, compute_fn=choice.specification)

    # From what was asked for to objects.

    def _parse(self, args: ArgsType) -> None:
        self.parse_arguments(self.parser, args)
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if not path or not os.path.isfile(path):
            return
        choice = self.subclass_mode_model
        chosen = self.config[subcommand].get("model.class_path") if choice else None
        if take_hyperparameters(self._parser(subcommand), path, chosen, choice):
            try:
                self.parse_arguments(self.parser, args)
            except SystemExit:
                sys.stderr.write(f"(the hyper-parameters in {path} are the defaults of --model here)\n")
                raise

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse into `self.config`.

        Args:
            parser: The parser.
            args: What to parse; None for the command line.
        """
        if args is not None and len(sys.argv) > 1:
            rank_zero_warn(
                f"LightningCLI was given args={args}, so these words of the command line are not read: {sys.argv[1:]}"
            )
        self.config = parser.parse_object(args) if isinstance(args, (dict, Namespace)) else parser.parse_args(args)

    def _seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is None or seed is False:
            return
        if seed is True:
            seed = None if SEED_VARIABLE in os.environ else 0
        chosen = seed_everything(seed, workers=True)
        self._part(self.config)["seed_everything"] = chosen

    def before_instantiate_classes(self) -> None:
        """Override to do something after parsing, before anything is made."""

    def instantiate_classes(self) -> None:
        """Make `self.datamodule`, `self.model` and `self.trainer`."""
        makers = []
        if self.load_from_checkpoint_support:
            parser, part = self._parser(self.subcommand), self._part(self.config)
            for key, base in (("model", LightningModule), ("data", LightningDataModule)):
                makers.append((Maker(self._classes[key], key, parser, part), base, True))
        self.config_init = self.parser.instantiate(self.config, instantiators=makers)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._give_configure_optimizers()
        self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Override to do something after everything was made, before anything is run."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer from what was parsed.

        Args:
            kwargs: Arguments of the trainer which come before those parsed.
        """
        parser = self._parser(self.subcommand)
        own = [self._get(self.config_init, key) for key in parser.callback_keys]
        return self._instantiate_trainer({**self._get(self.config_init, "trainer", {}), **kwargs}, own)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if "callbacks" not in config:
            rank_zero_warn(
                f"{self.trainer_class.__qualname__} has no argument 'callbacks', so it gets none, that which saves the "
                "configuration included"
            )
            return self.trainer_class(**config)
        wanted = [*_as_list(config["callbacks"]), *callbacks, *_as_list(self.trainer_defaults.get("callbacks"))]
        if self.save_config_callback and not config.get("fast_dev_run", False):
            wanted.append(
                self.save_config_callback(
                    self._parser(self.subcommand), self._part(self.config), **self.save_config_kwargs
                )
            )
        return self.trainer_class(**{**config, "callbacks": wanted})

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """What the module's `configure_optimizers` returns. Override to return something else.

        Args:
            lightning_module: The module.
            optimizer: The optimizer chosen.
            lr_scheduler: The scheduler chosen, if any.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor},
            }
        return [optimizer], [lr_scheduler]

    def _give_configure_optimizers(self) -> None:
        if not self.auto_configure_optimizers:
            return
        parser = self._parser(self.subcommand)
        optimizers = {key: choice for key, choice in parser.optimizer_choices.items() if choice.automatic}
        schedulers = {key: choice for key, choice in parser.lr_scheduler_choices.items() if choice.automatic}
        if len(optimizers) > 1 or (optimizers and len(schedulers) > 1):
            raise MisconfigurationException(
                f"the arguments of {', '.join([*optimizers, *schedulers])} are all link_to='AUTOMATIC', which one "
                "optimizer and one scheduler at most may be; give link_to='model.init_args.…' and write the module's "
                "configure_optimizers"
            )
        optimizer, scheduler = self._chosen(optimizers), self._chosen(schedulers)
        if optimizer is None:
            return
        if is_overridden("configure_optimizers", self.model, LightningModule):
            rank_zero_warn(
                f"{type(self.model).__name__}.configure_optimizers is not used: the optimizer given on the command "
                f"line, {optimizer['class_path']}, takes its place"
            )
        self.model.configure_optimizers = functools.partial(  # type: ignore[method-assign]
            configure_from, self.model, self.configure_optimizers, optimizer, scheduler
        )

    def _chosen(self, choices: dict[str, Choice]) -> dict[str, Any] | None:
        for key, choice in choices.items():
            return choice.specification(self._get(self.config_init, key))
        return None

    # The run.

    def _run_subcommand(self, subcommand: str) -> None:
        for name in (f"before_{subcommand}", subcommand, f"after_{subcommand}"):
            if name == subcommand:
                getattr(self, name, getattr(self.trainer, name))(**self._prepare_subcommand_kwargs(subcommand))
            elif hasattr(self, name):
                getattr(self, name)()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        parsed = self.config_init[subcommand]
        kwargs = {name: parsed[name] for name in self._subcommand_arguments[subcommand]}
        kwargs["model"] = self.model
        if self.datamodule is not None:
            kwargs["datamodule"] = self.datamodule
        return kwargs

    def _parser(self, subcommand: str | None) -> LightningArgumentParser:
        return self.parser if subcommand is None else self._subcommand_parsers[subcommand]

    def _part(self, config: Namespace) -> Namespace:
        """That part of a configuration which is the subcommand's; all of it where there is none."""
        return config[self.subcommand] if self.subcommand else config

    def _get(self, config: Namespace, key: str, default: Any = None) -> Any:
        return self._part(config).get(key, default)


def _as_list(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
