"""Which hook is called when, and what the counters are then: of module, callbacks, data module and optimizers.

A recording is a list of lines. One like "module.on_train_batch_start 0" is a call; the number is the batch's index, and
that of its loader follows where there are several. One like "= fit train, epoch 0, step 1, …" gives the counters that
hold from there on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from .programs import FEATURES, Stream, in_own_folder, loader, net, observed, part, trainer

PHASES = ("train", "validation", "test", "predict")
LOOP_HOOKS = [
    f"on_{phase}{of}_{end}" for phase, of, end in itertools.product(PHASES, ("", "_epoch", "_batch"), ("start", "end"))
]
SHARED_HOOKS = [
    *LOOP_HOOKS,
    "on_fit_start",
    "on_fit_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "setup",
    "teardown",
]
CALLBACK_HOOKS = [
    *SHARED_HOOKS,
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_exception",
    "state_dict",
    "load_state_dict",
]
TRANSFER_HOOKS = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]
LOADER_HOOKS = ["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"]
MODULE_HOOKS = [
    *SHARED_HOOKS,
    *TRANSFER_HOOKS,
    *(f"{phase}_step" for phase in ("training", *PHASES[1:])),
    *(f"on_{phase}_model_eval" for phase in PHASES[1:]),
    "on_validation_model_zero_grad",
    "on_validation_model_train",
    "on_test_model_train",
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "configure_model",
    "configure_optimizers",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "prepare_data",
]
DATA_HOOKS = ["prepare_data", "setup", "teardown", "on_exception", "state_dict", "load_state_dict", *LOADER_HOOKS]


COUNTS = {"validate": "num_val_batches", "test": "num_test_batches", "predict": "num_predict_batches"}


class Recording:
    """A module, a callback and a data module of a framework that write down each of their hooks, in one list.

    Args:
        pl: The framework.
        module: Given the framework, makes the module's class; by default `programs.net`.
        batches: Batches of each loader: train, val, test, predict.
        loaders: How many loaders there are for everything but training.
        data: What the data module's hooks return instead, by name.
        data_hooks: The data module's hooks to write down.
    """

    def __init__(
        self,
        pl: Any,
        module: Callable[[Any], type] = net,
        batches: tuple[int, int, int, int] = (2, 1, 1, 1),
        loaders: int = 1,
        data: dict[str, Any] | None = None,
        data_hooks: list[str] = DATA_HOOKS,
    ) -> None:
        self.lines: list[str] = []
        self._pl, self._trainer = pl, None
        self._several, self._loaded = loaders > 1, False
        self._counters = ""
        made: dict[str, Any] = {}
        for name, count in zip(LOADER_HOOKS, batches, strict=True):
            several = [loader(count) for _ in range(loaders)]
            made[name] = loader(count) if name == "train_dataloader" or loaders == 1 else several
        hooks = {name: lambda self, got=got: got for name, got in {**made, **(data or {})}.items()}
        data_class = type("Data", (pl.LightningDataModule,), hooks)
        self.module = observed(module(pl), MODULE_HOOKS, self._observer("module"))()
        self.callback = observed(pl.Callback, CALLBACK_HOOKS, self._observer("callback"))()
        self.data = observed(data_class, data_hooks, self._observer("data"))()

    def _observer(self, who: str) -> Callable[[str, dict[str, Any]], None]:
        def observe(hook: str, arguments: dict[str, Any]) -> None:
            self._note_counters()
            self._loaded |= hook in LOADER_HOOKS
            shown = [
                str(getattr(arguments[name], "value", arguments[name]))
                for name in ("stage", "batch_idx")
                if name in arguments
            ]
            if "dataloader_idx" in arguments and self._several and hook not in TRANSFER_HOOKS:
                shown.append(f"of loader {arguments['dataloader_idx']}")
            self.lines.append(" ".join([f"{who}.{hook}", *shown]))

        return observe

    def _note_counters(self) -> None:
        t = self._trainer
        if t is None:
            return
        stage = None if t.state.stage is None else t.state.stage.value
        counts = [t.num_training_batches, *t.num_sanity_val_batches, *t.num_val_batches]
        if t.state.fn != "fit":
            counts = getattr(t, COUNTS[t.state.fn.value]) if self._loaded else []
        counters = (
            f"= {t.state.fn.value} {stage}, epoch {t.current_epoch}, step {t.global_step}, "
            f"batches {' '.join(str(count) for count in counts)}"
            f"{', last batch' if t.is_last_batch else ''}{', stopping' if t.should_stop else ''}"
        )
        if counters != self._counters:
            self._counters = counters
            self.lines.append(counters)

    def run(self, entry_point: str = "fit", ckpt_path: Any = None, **settings: Any) -> Recording:
        """Run an entry point: of a new Trainer with these settings, or without any of the Trainer of the former run."""
        if settings or self._trainer is None:
            callbacks = [self.callback, *settings.pop("callbacks", [])]
            self._trainer = trainer(self._pl, callbacks=callbacks, **settings)
        self.lines.append(f"== {entry_point}")
        self._loaded = False
        arguments = {"verbose": False} if entry_point in ("validate", "test") else {}
        getattr(self._trainer, entry_point)(self.module, datamodule=self.data, ckpt_path=ckpt_path, **arguments)
        self._note_counters()
        return self


def scheduled(*configs: dict[str, Any]) -> Callable[[Any], type]:
    """A module whose optimizer, an observed one, has a scheduler with each of these configurations."""

    def make(pl: Any) -> type:
        class Scheduled(net(pl)):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
                return [optimizer], [
                    {
                        "scheduler": ReduceLROnPlateau(optimizer) if "monitor" in config else StepLR(optimizer, 1),
                        **config,
                    }
                    for config in configs
                ]

            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
                self.log("val_loss", self(batch).mean())

        return Scheduled

    return make


def adversarial(pl: Any) -> type:
    """Two optimizers, each with a scheduler, and all of it stepped by hand."""

    class Adversarial(net(pl)):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = torch.nn.Linear(FEATURES, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for network, optimizer, scheduler in zip(
                (self.layer, self.other), self.optimizers(), self.lr_schedulers(), strict=True
            ):
                self.toggle_optimizer(optimizer)
                loss = network(batch[0]).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                optimizer.step()
                self.untoggle_optimizer(optimizer)
                if self.trainer.is_last_batch:
                    scheduler.step()

        def configure_optimizers(self) -> Any:
            both = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.layer, self.other)]
            return both, [StepLR(optimizer, 1) for optimizer in both]

    return Adversarial


def with_method(name: str, method: Callable[..., Any]) -> Callable[[Any], type]:
    """A module with that method besides."""
    return lambda pl: type("Net", (net(pl),), {name: method})


def lbfgs(self: Any) -> Any:
    return torch.optim.LBFGS(self.parameters(), max_iter=2)


def skip_second(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx == 1 else self(batch).mean()


def leave_second(self: Any, batch: Any, batch_idx: int) -> Any:
    return -1 if batch_idx == 1 else None


def stop_in_second(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    self.trainer.should_stop = self.trainer.should_stop or batch_idx == 1


def step_every_second(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
    if batch_idx % 2:
        optimizer.step(closure=optimizer_closure)
    else:
        optimizer_closure()


def fail(self: Any, *args: Any) -> None:
    raise ArithmeticError


def saving(pl: Any, **options: Any) -> Any:
    return part(pl, "callbacks").ModelCheckpoint(dirpath=Path.cwd(), **options)


def failing(pl: Any, hook: str) -> list[str]:
    recording = Recording(pl, with_method(hook, fail))
    try:
        recording.run(num_sanity_val_steps=0)
    except ArithmeticError:
        recording.lines.append("== ArithmeticError")
    return recording.lines


def resumed(pl: Any, max_epochs: int = 2, **options: Any) -> list[str]:
    recording = Recording(pl, batches=(3, 1, 1, 1))
    recording.run(callbacks=[saving(pl, filename="one", **options)], enable_checkpointing=True)
    return recording.run(ckpt_path="one.ckpt", max_epochs=max_epochs).lines


def fit(settings: dict[str, Any], **recording: Any) -> Callable[[Any], list[str]]:
    """A case: a fit with these settings of the Trainer, and these arguments of `Recording`."""
    return lambda pl: Recording(pl, **recording).run(**settings).lines


CASES: dict[str, Callable[[Any], list[str]]] = {
    "sanity validation, two loaders": fit(
        {"num_sanity_val_steps": 1, "max_epochs": 2}, batches=(1, 2, 1, 1), loaders=2
    ),
    "sanity validation of everything": fit(
        {"num_sanity_val_steps": -1, "limit_train_batches": 1}, batches=(1, 3, 1, 1)
    ),
    "accumulation of two over five, clipped": fit(
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_epochs": 1}, batches=(5, 1, 1, 1)
    ),
    "accumulation and validation within a window": fit(
        {"accumulate_grad_batches": 2, "val_check_interval": 1}, batches=(3, 1, 1, 1)
    ),
    "two optimizers by hand": fit({"max_epochs": 2}, module=adversarial),
    "validation every two batches of five": fit({"val_check_interval": 2}, batches=(5, 1, 1, 1)),
    "validation every half epoch of five": fit({"val_check_interval": 0.5}, batches=(5, 1, 1, 1)),
    "validation every three batches over epochs": fit(
        {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 3}
    ),
    "validation every second epoch": fit({"check_val_every_n_epoch": 2, "max_epochs": 3}, batches=(1, 1, 1, 1)),
    "validation left out": fit({"limit_val_batches": 0, "num_sanity_val_steps": 2}),
    "training left out": fit({"limit_train_batches": 0}),
    "no epochs": fit({"max_epochs": 0}),
    "limits as shares": fit({"limit_train_batches": 0.5, "limit_val_batches": 0.5}, batches=(4, 2, 1, 1)),
    "schedulers by step, epoch and plateau": fit(
        {"max_epochs": 2},
        module=scheduled(
            {"interval": "step", "frequency": 2}, {"interval": "epoch"}, {"monitor": "val_loss", "frequency": 1}
        ),
        batches=(3, 1, 1, 1),
    ),
    "a scheduler by step, accumulating": fit(
        {"accumulate_grad_batches": 2}, module=scheduled({"interval": "step"}), batches=(3, 1, 1, 1)
    ),
    "max_steps within an epoch": fit({"max_steps": 3, "max_epochs": 5}),
    "max_steps at an epoch's end": fit({"max_steps": 2, "max_epochs": 5}),
    "a stop asked for within an epoch": fit(
        {"max_epochs": 2}, module=with_method("on_train_batch_end", stop_in_second), batches=(4, 1, 1, 1)
    ),
    "a stop asked for before min_steps": fit(
        {"max_epochs": 3, "min_steps": 5},
        module=with_method("on_train_batch_end", stop_in_second),
        batches=(3, 1, 1, 1),
    ),
    "the rest of an epoch skipped": fit(
        {"max_epochs": 2}, module=with_method("on_train_batch_start", leave_second), batches=(3, 1, 1, 1)
    ),
    "a batch skipped": fit({}, module=with_method("training_step", skip_second), batches=(3, 1, 1, 1)),
    "an iterable without length": fit(
        {"max_epochs": 2}, data={"train_dataloader": torch.utils.data.DataLoader(Stream(2))}
    ),
    "two training loaders": fit(
        {},
        data={"train_dataloader": [loader(2), loader(2)]},
        module=with_method("training_step", lambda self, batch, batch_idx: self(batch[0]).mean()),
    ),
    "loaders anew each epoch": fit({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, batches=(1, 1, 1, 1)),
    "fast_dev_run": fit({"fast_dev_run": True}),
    "overfit_batches": fit({"overfit_batches": 1, "max_epochs": 1}),
    "barebones": fit(
        {
            "barebones": True,
            "log_every_n_steps": None,
            "num_sanity_val_steps": None,
            "enable_checkpointing": None,
            "enable_model_summary": None,
            "enable_progress_bar": None,
            "logger": None,
        }
    ),
    "LBFGS": fit({}, module=with_method("configure_optimizers", lbfgs)),
    "an optimizer stepped every second batch": fit({}, module=with_method("optimizer_step", step_every_second)),
    "no optimizer": fit({}, module=with_method("configure_optimizers", lambda self: None)),
    "transfer hooks of the data module": fit({}, data_hooks=TRANSFER_HOOKS),
    "a checkpoint every step": lambda pl: (
        Recording(pl).run(callbacks=[saving(pl, every_n_train_steps=1)], enable_checkpointing=True).lines
    ),
    "resumed from an epoch's end": lambda pl: resumed(pl),
    "resumed from within an epoch": lambda pl: resumed(pl, every_n_train_steps=2),
    "training_step fails": lambda pl: failing(pl, "training_step"),
    "validation_step fails": lambda pl: failing(pl, "validation_step"),
    "on_fit_start fails": lambda pl: failing(pl, "on_fit_start"),
    "resumed from the end": lambda pl: resumed(pl, max_epochs=1),
    "fit, then fit": lambda pl: Recording(pl).run(max_epochs=1).run().lines,
    "fit, then validate, test and predict": lambda pl: (
        Recording(pl).run(max_epochs=1).run("validate").run("test").run("predict").lines
    ),
    "validate two loaders": lambda pl: Recording(pl, batches=(1, 2, 1, 1), loaders=2).run("validate").lines,
    "test with a limit": lambda pl: Recording(pl, batches=(1, 1, 3, 1)).run("test", limit_test_batches=2).lines,
    "predict two loaders": lambda pl: Recording(pl, batches=(1, 1, 1, 2), loaders=2).run("predict").lines,
}


def record(pl: Any) -> dict[str, list[str]]:
    """Every case's lines, by the case's name."""
    return {name: in_own_folder(case, pl) for name, case in CASES.items()}
